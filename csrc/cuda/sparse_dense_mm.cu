// C = A[rows][:, cols] @ B[cols, :], scattered into zeros (eq. 1).
#include "store_product.cuh"

namespace sparsegrad {
namespace {

Tensor sparse_dense_mm(const Tensor& a, const Tensor& b, double tol) {
  check_product(a, b);
  const DeviceGuard on_device(a.get_device_index());
  const NoGrad no_grad;
  Tensor out = empty_on(a, a.size(0), b.size(1), a.scalar_type());
  if (out.numel() == 0) {
    return out;
  }
  if (a.size(1) == 0) {
    return torch::stable::zero_(out);
  }
  const auto [rows, cols, counts] = compact_indices(a, tol);
  const int32_t* n = static_cast<const int32_t*>(counts.const_data_ptr());
  dispatch_float(a.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    store_product<T>(
        out, {.a = operand<T>(a, 0, true),
              .b = operand<T>(b, 1, true),
              .depth_size = static_cast<int32_t>(a.size(1)),
              .rows = static_cast<const int32_t*>(rows.const_data_ptr()),
              .depths = static_cast<const int32_t*>(cols.const_data_ptr()),
              .n_rows = n,
              .n_depths = n + 1,
              .tf32 = allows_tf32(a.scalar_type())});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("sparse_dense_mm", TORCH_BOX(&sparse_dense_mm));
}

}  // namespace sparsegrad
