#pragma once

#include "rows_cols.h"

namespace sparsegrad {

// a[rows][:, cols], in the memory order of a. An axis that is kept whole is not indexed.
Tensor gather(const Tensor& a, const std::vector<int64_t>& rows, const std::vector<int64_t>& cols);

// sparse_dense_mm
Tensor product_of(const Tensor& a, const Tensor& b, double tol);

// C of eq. 1 for given rows and columns of a: a[rows][:, cols] @ b[cols].
Tensor compacted_product(const Tensor& a, const Tensor& b, const RowsCols& kept);

// Checks that protect memory.
void check_product(const Tensor& a, const Tensor& b);

}  // namespace sparsegrad
