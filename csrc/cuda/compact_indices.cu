// rows and cols of nonzero_rows_cols as int32, padded with -1 to [b] and [c], and their counts.
//
// SASS: LDG\.E\.128, VOTE
#include "rows_cols.cuh"

namespace sparsegrad {
namespace {

std::tuple<Tensor, Tensor, Tensor> compact_indices(const Tensor& a, double tol) {
  return find_rows_cols<int32_t>(a, tol);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("compact_indices", TORCH_BOX(&compact_indices));
}

}  // namespace sparsegrad
