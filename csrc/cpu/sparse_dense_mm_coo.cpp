// C_coo[rows[k], l] = (A[rows][:, cols] @ B[cols, :])[k, l] (eq. 2), in row-major order.
#include "product.h"

namespace sparsegrad {
namespace {

std::tuple<Tensor, Tensor> sparse_dense_mm_coo(const Tensor& a, const Tensor& b, double tol) {
  check_product(a, b);
  const RowsCols kept = find_rows_cols(a, tol);
  const int64_t n_rows = static_cast<int64_t>(kept.rows.size()), d = b.size(1), n = n_rows * d;
  Tensor indices = empty({2, n}, ScalarType::Long);
  int64_t* rows = static_cast<int64_t*>(indices.mutable_data_ptr());
  int64_t* cols = rows + n;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, d));
  for_range(n_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        rows[i * d + j] = kept.rows[i];
        cols[i * d + j] = j;
      }
    }
  });
  const NoGrad no_grad;
  return {indices, torch::stable::flatten(compacted_product(a, b, kept), 0, -1)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("sparse_dense_mm_coo", TORCH_BOX(&sparse_dense_mm_coo));
}

}  // namespace sparsegrad
