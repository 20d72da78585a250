// C = A[rows][:, cols] @ B[cols, :] as COO: the values are C, row by row (eq. 2).
//
// The size of the result depends on the data, so the host reads the counts, and then may as well
// gather what is kept and leave the product to torch.
#include "compacted.cuh"

namespace sparsegrad {
namespace {

constexpr int kThreads = 256;

// indices [2, n_rows * n_cols]: the row and the column of each value.
__global__ void fill_indices(
    const int32_t* __restrict__ rows, int64_t n_rows, int64_t n_cols, int64_t* __restrict__ out) {
  for (int64_t i = blockIdx.x; i < n_rows; i += gridDim.x) {
    const int64_t row = rows[i];
    for (int64_t col = threadIdx.x; col < n_cols; col += kThreads) {
      out[i * n_cols + col] = row;
      out[(n_rows + i) * n_cols + col] = col;
    }
  }
}

Tensor index_select(const Tensor& t, int64_t axis, const Tensor& indices) {
  return call("aten::index_select", "", t, axis, indices);
}

// The elements of `counts`, once the device has them.
std::array<int64_t, 2> read_counts(const Tensor& counts, cudaStream_t stream) {
  int32_t n[2];
  check_cuda(cudaMemcpyAsync(
      n, counts.const_data_ptr(), sizeof(n), cudaMemcpyDeviceToHost, stream));
  check_cuda(cudaStreamSynchronize(stream));
  return {n[0], n[1]};
}

std::tuple<Tensor, Tensor> sparse_dense_mm_coo(const Tensor& a, const Tensor& b, double tol) {
  check_product(a, b);
  const DeviceGuard on_device(a.get_device_index());
  const NoGrad no_grad;
  const cudaStream_t stream = current_stream(a);
  auto [rows, cols, counts] = compact_indices(a, tol);
  const auto [n_rows, n_kept] = read_counts(counts, stream);
  const int64_t n_cols = b.size(1), n = n_rows * n_cols;
  Tensor indices = empty_on(a, 2, n, ScalarType::Long);
  if (n == 0) {
    return {indices, empty_on(a, 0, a.scalar_type())};
  }

  Tensor left = a, right = b;
  rows = torch::stable::narrow(rows, 0, 0, n_rows);
  if (n_rows < a.size(0)) {
    left = index_select(left, 0, rows);
  }
  if (n_kept < a.size(1)) {
    cols = torch::stable::narrow(cols, 0, 0, n_kept);
    left = index_select(left, 1, cols);
    right = index_select(right, 0, cols);
  }
  const Tensor values = torch::stable::reshape(mm(left, right), {n});

  const int64_t blocks = std::min<int64_t>(n_rows, 8 * multiprocessors(a));
  fill_indices<<<blocks, kThreads, 0, stream>>>(
      static_cast<const int32_t*>(rows.const_data_ptr()), n_rows, n_cols,
      static_cast<int64_t*>(indices.mutable_data_ptr()));
  check_launch();
  return {indices, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("sparse_dense_mm_coo", TORCH_BOX(&sparse_dense_mm_coo));
}

}  // namespace sparsegrad
