// Their number is the shape of the result: the host reads it, once, at the end.
#include "rows_cols.cuh"

namespace sparsegrad {
namespace {

std::tuple<Tensor, Tensor> nonzero_rows_cols(const Tensor& a, double tol) {
  auto [rows, cols, counts] = find_rows_cols<int64_t>(a, tol);
  const DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = current_stream(a);
  int64_t n[2];
  check_cuda(cudaMemcpyAsync(
      n, counts.const_data_ptr(), sizeof(n), cudaMemcpyDeviceToHost, stream));
  check_cuda(cudaStreamSynchronize(stream));
  return {torch::stable::narrow(rows, 0, 0, n[0]), torch::stable::narrow(cols, 0, 0, n[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("nonzero_rows_cols", TORCH_BOX(&nonzero_rows_cols));
}

}  // namespace sparsegrad
