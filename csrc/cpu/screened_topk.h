#pragma once

#include "../common.h"

namespace sparsegrad {

// topk_coo(left^T right, k) for float32, where bfloat16 products are fast and leave few candidates;
// else nothing. `left [n, rows]`, `right [n, cols]`; row i of the product is row `row_of[i]` of the
// result, and all others are zero.
std::optional<std::tuple<Tensor, Tensor>> screened_topk(
    const Tensor& left, const Tensor& right, int64_t k, const std::vector<int64_t>& row_of);

}  // namespace sparsegrad
