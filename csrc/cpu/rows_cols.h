#pragma once

#include "../common.h"

namespace sparsegrad {

// The rows and columns of `a` with an entry of magnitude above tol, ascending.
struct RowsCols {
  std::vector<int64_t> rows, cols;
};

RowsCols find_rows_cols(const Tensor& a, double tol);

}  // namespace sparsegrad
