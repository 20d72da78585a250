// A product as a matrix. Compiled once, for all who want one: in products.cu.
#pragma once

#include "product.cuh"

namespace sparsegrad {

// out[rows] = the product, the other rows 0. `out` is contiguous. `lists_others`: whether in p.rows
// the rows that are left out follow those that are kept, up to all of them.
template <class T>
void store_product(const Tensor& out, const Product<T>& p, bool lists_others = false);

}  // namespace sparsegrad
