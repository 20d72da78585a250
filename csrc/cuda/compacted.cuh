// What the compacted products share on the host: input checks, and their kept rows and columns.
#pragma once

#include "common.cuh"

namespace sparsegrad {

// rows [b], cols [c], counts [2] of a [b, c], by the operator of that name.
inline std::tuple<Tensor, Tensor, Tensor> compact_indices(const Tensor& a, double tol) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(tol)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "sparsegrad_kernels::compact_indices", "", stack.data(), TORCH_ABI_VERSION));
  return {
      torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
      torch::stable::detail::to<Tensor>(stack[2])};
}

// Indices are int32 on the device, and tiles reach a little beyond the last.
inline void check_sizes(const char* name, const Tensor& t) {
  check_matrix(name, t);
  STD_TORCH_CHECK(
      std::max(t.size(0), t.size(1)) < (int64_t{1} << 31) - (1 << 10), name,
      " must have fewer than 2^31 rows and columns, got ", t.size(0), " x ", t.size(1));
}

// a @ b
inline void check_product(const Tensor& a, const Tensor& b) {
  check_sizes("a", a);
  check_sizes("b", b);
  check_dtype("b", b, a.scalar_type());
  check_size("b", b.size(0), a.size(1));
  check_device("b", b, a);
}

}  // namespace sparsegrad
