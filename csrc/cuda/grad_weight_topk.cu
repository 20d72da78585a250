// topk_coo(g^T x, k), without the tokens and the outputs whose g is zero.
//
// The product of one layer stays in the L2 cache, where topk_coo finds it. Near a threshold it is
// not even made: see near.cuh.
//
// SASS: HMMA\.16816\.F32\.BF16, HMMA\.1688\.F32\.TF32
#include "near.cuh"

namespace sparsegrad {
namespace {

constexpr float kSlack = 0.8f;  // SLACK of ops/grad_weight_topk.py
constexpr int kThreads = 1024;

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
  Tensor out = torch::stable::new_empty(g, {g.size(1), x.size(1)});
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
  const Tensor product = grad_weight(g, x, tol);
  std::array<StableIValue, 2> stack{
      torch::stable::detail::from(product), torch::stable::detail::from(k)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "sparsegrad_kernels::topk_coo", "", stack.data(), TORCH_ABI_VERSION));
  return {
      torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The threshold for the next call: kSlack times the smallest of n > 0 magnitudes, NaN left out.
template <class T>
__global__ void __launch_bounds__(kThreads) carry(
    const T* __restrict__ values, int64_t n, float* __restrict__ threshold) {
  __shared__ float smallest[kThreads / 32];
  float least = INFINITY;
  for (int64_t e = threadIdx.x; e < n; e += kThreads) {
    least = fminf(least, fabsf(static_cast<float>(values[e])));  // not NaN, if one is not
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step > 0; step /= 2) {
    least = fminf(least, __shfl_xor_sync(~0u, least, step));
  }
  if (lane == 0) {
    smallest[warp] = least;
  }
  __syncthreads();
  if (warp == 0) {
    least = smallest[lane];
    for (int step = 16; step > 0; step /= 2) {
      least = fminf(least, __shfl_xor_sync(~0u, least, step));
    }
    if (lane == 0) {
      *threshold = kSlack * least;
    }
  }
}

void carry_threshold(const Tensor& threshold, const Tensor& values) {
  if (values.numel() == 0) {
    return;
  }
  dispatch_float(values.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    carry<T><<<1, kThreads, 0, current_stream(values)>>>(
        static_cast<const T*>(values.const_data_ptr()), values.numel(),
        static_cast<float*>(threshold.mutable_data_ptr()));
    check_launch();
  });
}

std::tuple<Tensor, Tensor> grad_weight_topk_near(
    const Tensor& g, const Tensor& x, int64_t k, double tol, const Tensor& threshold) {
  check(g, x, k);
  check_dtype("threshold", threshold, ScalarType::Float);
  check_size("threshold", threshold.numel(), 1);
  check_device("threshold", threshold, g);
  mark_written(threshold);
  const DeviceGuard on_device(g.get_device_index());
  const NoGrad no_grad;
  std::tuple<Tensor, Tensor> entries;
  if (g.size(0) == 0 || k >= g.size(1) * x.size(1)) {
    entries = grad_weight_topk(g, x, k, tol);
  } else {
    const GradWeight gradient(g, x, tol);
    dispatch_float(g.scalar_type(), [&](auto t) {
      using T = typename decltype(t)::type;
      entries = topk_near<T>(g, gradient.product<T>(), k, threshold);
    });
  }
  carry_threshold(threshold, std::get<1>(entries));
  return entries;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("grad_weight_topk", TORCH_BOX(&grad_weight_topk));
  m.impl("_grad_weight_topk_near", TORCH_BOX(&grad_weight_topk_near));
}

}  // namespace sparsegrad
