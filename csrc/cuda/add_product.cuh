// A product that is added to a matrix. Compiled once, for both folds: in add_product.cu.
#pragma once

#include "product.cuh"
#include "round.cuh"

namespace sparsegrad {

// to = round(to + the product); the outer axes of both operands are contiguous.
template <class T, class Round>
void add_product(const Tensor& to, const Product<T>& p, const Round& round);

}  // namespace sparsegrad
