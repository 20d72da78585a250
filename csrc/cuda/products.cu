// Products that are stored, or of which what reaches a threshold is collected.
//
// Stored ones have zeros in the rows that were left out.
//
// SASS: HMMA\.16816\.F32\.BF16, HMMA\.1688\.F32\.TF32, LDSM\.16\.M88\.4, LDSM\.16\.MT88\.4, LDGSTS\.E\.BYPASS\.128
// SASS sm_90a: HGMMA\.64x128x16\.F32\.BF16
#include "collect_product.cuh"
#include "store_product.cuh"

namespace sparsegrad {
namespace {

template <class T>
struct StoreProduct {
  T* out;  // [n_out_rows, n_cols], contiguous
  int32_t n_out_rows, n_cols;
  const int32_t* rows;  // kept, ascending
  bool lists_others;    // whether the rows that are left out follow them, up to n_out_rows

  // A warp per row, over the whole grid.
  __device__ void before(int32_t n_rows) const {
    if (n_rows == n_out_rows) {
      return;
    }
    const int warps = blockDim.x / 32, warp = blockIdx.x * warps + threadIdx.x / 32;
    for (int64_t i = warp + (lists_others ? n_rows : 0); i < n_out_rows; i += gridDim.x * warps) {
      if (lists_others) {
        clear(rows[i]);
      } else if (!is_listed(rows, n_rows, i)) {
        clear(i);
      }
    }
  }

  // By a warp.
  __device__ void clear(int64_t row) const {
    constexpr int kVector = 16 / sizeof(T);
    T* const to = out + row * n_cols;
    if (n_cols % kVector == 0) {
      for (int32_t i = threadIdx.x % 32; i < n_cols / kVector; i += 32) {
        reinterpret_cast<uint4*>(to)[i] = {};
      }
      return;
    }
    for (int32_t col = threadIdx.x % 32; col < n_cols; col += 32) {
      to[col] = static_cast<T>(0.0f);
    }
  }

  template <class Visit>
  __device__ void operator()(const Visit& visit) const {
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    };
    visit([&](int32_t row, int32_t col, auto value, auto next, bool has_next) {
      T* to = out + int64_t{row} * n_cols + col;
      if (n_cols % 2 == 0) {
        *reinterpret_cast<Pair*>(to) = {static_cast<T>(value), static_cast<T>(next)};
        return;
      }
      to[0] = static_cast<T>(value);
      if (has_next) {
        to[1] = static_cast<T>(next);
      }
    });
  }
};

}  // namespace

template <class T>
void store_product(const Tensor& out, const Product<T>& p, bool lists_others) {
  const StoreProduct<T> epilogue{
      static_cast<T*>(out.mutable_data_ptr()), static_cast<int32_t>(out.size(0)),
      static_cast<int32_t>(out.size(1)), p.rows, lists_others};
  launch_product_of(out, p, epilogue);
}

template void store_product(const Tensor&, const Product<float>&, bool);
template void store_product(const Tensor&, const Product<double>&, bool);
template void store_product(const Tensor&, const Product<BFloat16>&, bool);
template void store_product(const Tensor&, const Product<Half>&, bool);

template <class T>
void collect_product(const Tensor& like, const Product<T>& p, const CollectProduct<T>& epilogue) {
  launch_product_of(like, p, epilogue);
}

template void collect_product(const Tensor&, const Product<float>&, const CollectProduct<float>&);
template void collect_product(
    const Tensor&, const Product<double>&, const CollectProduct<double>&);
template void collect_product(
    const Tensor&, const Product<BFloat16>&, const CollectProduct<BFloat16>&);
template void collect_product(const Tensor&, const Product<Half>&, const CollectProduct<Half>&);

}  // namespace sparsegrad
