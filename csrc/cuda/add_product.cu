// The epilogue that adds a product to a matrix.
//
// SASS: HMMA\.16816\.F32\.BF16, HMMA\.1688\.F32\.TF32
// SASS sm_90a: HGMMA\.64x128x16\.F32\.BF16
#include "add_product.cuh"

namespace sparsegrad {
namespace {

template <class T, class Round>
struct AddProduct {
  Matrix<T> weight;
  Round round;

  __device__ void before(int32_t) const {}

  __device__ T* at(T* data, int32_t row, int32_t col) const {
    return data + row * weight.row_stride + col * weight.col_stride;
  }

  template <class Visit>
  __device__ void operator()(const Visit& visit) const {
    // All is read before any is written, so that the reads need not wait for one another.
    visit([&](int32_t row, int32_t col, auto& value, auto& next, bool has_next) {
      value += static_cast<wide_t<T>>(*at(weight.data, row, col));
      if (has_next) {
        next += static_cast<wide_t<T>>(*at(weight.data, row, col + 1));
      }
    });
    T* data = weight.data;
    asm volatile("" : "+l"(data));  // or the addresses would be kept for the writes: too many
    visit([&](int32_t row, int32_t col, auto value, auto next, bool has_next) {
      const int64_t element = row * weight.cols + col;
      *at(data, row, col) = round(value, *at(data, row, col), element);
      if (has_next) {
        *at(data, row, col + 1) = round(next, *at(data, row, col + 1), element + 1);
      }
    });
  }
};

}  // namespace

template <class T, class Round>
void add_product(const Tensor& to, const Product<T>& p, const Round& round) {
  launch_product_as<true, true>(to, p, AddProduct<T, Round>{mutable_matrix<T>(to), round});
}

template void add_product(const Tensor&, const Product<float>&, const RoundNearest<float>&);
template void add_product(const Tensor&, const Product<double>&, const RoundNearest<double>&);
template void add_product(const Tensor&, const Product<BFloat16>&, const RoundNearest<BFloat16>&);
template void add_product(const Tensor&, const Product<Half>&, const RoundNearest<Half>&);
template void add_product(
    const Tensor&, const Product<BFloat16>&, const RoundStochastic<BFloat16>&);
template void add_product(const Tensor&, const Product<Half>&, const RoundStochastic<Half>&);

}  // namespace sparsegrad
