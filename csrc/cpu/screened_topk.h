#pragma once

#include "product.h"

namespace sparsegrad {

// grad_weight_topk(g, x, k) for float32, where bfloat16 products are fast and leave few candidates;
// else nothing. `kept` are the tokens and outputs of `g [T, out]` that are not zero, `right` are the
// kept tokens of x.
std::optional<std::tuple<Tensor, Tensor>> screened_topk(
    const Tensor& g, const RowsCols& kept, const Tensor& right, int64_t k);

}  // namespace sparsegrad
