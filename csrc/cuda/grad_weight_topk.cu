// topk_coo(g^T x, k), without the tokens and the outputs whose g is zero.
//
// A product that stays in the L2 cache is where topk_coo finds it; near a threshold a larger one is
// not even made: see near.cuh.
#include "near.cuh"

namespace sparsegrad {
namespace {

// g^T x [out, in], nothing of which is empty, as it is to be summed; what it reads must outlive it.
struct GradWeight {
  const Tensor &g, &x;
  Tensor tokens, rows, counts;  // those of g that are not zero

  GradWeight(const Tensor& g, const Tensor& x, double tol) : g(g), x(x) {
    std::tie(tokens, rows, counts) = compact_indices(g, tol);
  }

  template <class T>
  Product<T> product() const {
    const int32_t* n = static_cast<const int32_t*>(counts.const_data_ptr());
    return {.a = operand<T>(g, 1, true),
            .b = operand<T>(x, 1, true),
            .depth_size = static_cast<int32_t>(g.size(0)),
            .rows = static_cast<const int32_t*>(rows.const_data_ptr()),
            .depths = static_cast<const int32_t*>(tokens.const_data_ptr()),
            .n_rows = n + 1,
            .n_depths = n,
            .tf32 = allows_tf32(g.scalar_type())};
  }
};

Tensor grad_weight(const Tensor& g, const Tensor& x, double tol) {
  Tensor out = empty_on(g, g.size(1), x.size(1), g.scalar_type());
  if (out.numel() == 0) {
    return out;
  }
  if (g.size(0) == 0) {
    return torch::stable::zero_(out);
  }
  const GradWeight gradient(g, x, tol);
  dispatch_float(g.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    store_product<T>(out, gradient.product<T>());
  });
  return out;
}

void check(const Tensor& g, const Tensor& x, int64_t k) {
  check_sizes("g", g);
  check_sizes("x", x);
  check_dtype("x", x, g.scalar_type());
  check_size("x", x.size(0), g.size(0));
  check_device("x", x, g);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
}

std::tuple<Tensor, Tensor> grad_weight_topk(
    const Tensor& g, const Tensor& x, int64_t k, double tol) {
  check(g, x, k);
  const DeviceGuard on_device(g.get_device_index());
  const NoGrad no_grad;
  return topk_with_shortlist(grad_weight(g, x, tol), k, Shortlist{}, nullptr);
}

std::tuple<Tensor, Tensor> grad_weight_topk_near(
    const Tensor& g, const Tensor& x, int64_t k, double tol, const Tensor& threshold) {
  check(g, x, k);
  check_dtype("threshold", threshold, ScalarType::Float);
  check_size("threshold", threshold.numel(), 1);
  check_device("threshold", threshold, g);
  mark_written("threshold", threshold);
  const DeviceGuard on_device(g.get_device_index());
  const NoGrad no_grad;
  const int64_t n = g.size(1) * x.size(1);
  if (g.size(0) == 0 || k >= n || is_selected_at_once(g, n, k)) {
    return topk_with_shortlist(
        grad_weight(g, x, tol), k, Shortlist{}, static_cast<float*>(threshold.mutable_data_ptr()));
  }
  const GradWeight gradient(g, x, tol);
  return dispatch_float(g.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    return topk_near<T>(g, gradient.product<T>(), k, threshold);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("grad_weight_topk", TORCH_BOX(&grad_weight_topk));
  m.impl("_grad_weight_topk_near", TORCH_BOX(&grad_weight_topk_near));
}

}  // namespace sparsegrad
