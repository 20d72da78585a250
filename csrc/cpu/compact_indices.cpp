// rows and cols of nonzero_rows_cols as int32, padded with -1 to [b] and [c], and their counts.
#include "rows_cols.h"

namespace sparsegrad {
namespace {

Tensor padded(const std::vector<int64_t>& found, int64_t n) {
  Tensor out = empty({n}, ScalarType::Int);
  int32_t* data = static_cast<int32_t*>(out.mutable_data_ptr());
  int32_t* end = std::copy(found.begin(), found.end(), data);
  std::fill(end, data + n, -1);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> compact_indices(const Tensor& a, double tol) {
  const RowsCols found = find_rows_cols(a, tol);
  Tensor counts = empty({2}, ScalarType::Int);
  int32_t* data = static_cast<int32_t*>(counts.mutable_data_ptr());
  data[0] = static_cast<int32_t>(found.rows.size());
  data[1] = static_cast<int32_t>(found.cols.size());
  return {padded(found.rows, a.size(0)), padded(found.cols, a.size(1)), counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("compact_indices", TORCH_BOX(&compact_indices));
}

}  // namespace sparsegrad
