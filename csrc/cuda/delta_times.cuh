// delta basis, read off a delta that is mostly zeros: its entries are compacted in shared memory,
// multiplied by rows of the basis there and then, and set to zero where they were.
//
//   to(outer, :) (+)= sum over inner, ascending, of delta(outer, inner) basis(inner, :)
//
// What is kept of a sum is the affair of `to`. Any delta is right: what does not fit into shared
// memory at once is compacted and added in several rounds.
#pragma once

#include "pack.cuh"
#include "round.cuh"

namespace sparsegrad {
namespace {

// Whether each row of the matrix is whole aligned vectors.
template <class T>
bool takes_vectors(const Matrix<T>& m) {
  constexpr int kVector = 16 / sizeof(T);
  return m.col_stride == 1 && m.row_stride % kVector == 0 && m.cols % kVector == 0 &&
         is_aligned_to_pack(m.data);
}

// ---- What becomes of sums ----

// They are added to W, or to W^T: elements are numbered as those of W.
template <class T, class Round>
struct AddTo {
  static constexpr bool kAdds = true;
  Matrix<T> weight;
  int64_t element_row_stride, element_col_stride;
  Round round;

  bool takes_rows() const {
    return takes_vectors(weight);
  }
  bool takes_columns() const {
    return takes_vectors(weight.transposed());
  }
  AddTo transposed() const {
    return {weight.transposed(), element_col_stride, element_row_stride, round};
  }

  __device__ T add(T old, wide_t<T> sum, int64_t row, int64_t col) const {
    const int64_t element = row * element_row_stride + col * element_col_stride;
    return round(static_cast<wide_t<T>>(old) + sum, old, element);
  }
};

// They are a row of a factor, or in two parts two: in T, and what that lacks.
template <class T>
struct StoreFactor {
  static constexpr bool kAdds = false;
  T* out;
  int64_t pitch;  // of whole vectors, as `out` is
  int parts;
  int32_t* depths;  // where there are parts: the row that each is of

  bool takes_rows() const {
    return true;
  }
  bool takes_columns() const {
    return true;
  }

  template <int kVector>
  __device__ void store(int64_t row, int64_t col, wide_t<T> (&sum)[kVector]) const {
    for (int part = 0; part < parts; ++part) {
      Pack<T, kVector> rounded;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        rounded.at[j] = static_cast<T>(sum[j]);
        const wide_t<T> left = sum[j] - static_cast<wide_t<T>>(rounded.at[j]);
        sum[j] = left - left == 0 ? left : 0;  // nothing is left of what T cannot hold
      }
      const int64_t at = row * parts + part;
      *reinterpret_cast<Pack<T, kVector>*>(out + at * pitch + col) = rounded;
      if (depths != nullptr && col == 0) {
        depths[at] = static_cast<int32_t>(row);
      }
    }
  }
};

// ---- What both kernels do with entries ----

constexpr int kDeltaThreads = 256;  // at most
// sum[j] += sum over n entries of value * basis(inner, col + j); kBatch rows of the basis are read
// at once.
template <int kVector, int kBatch, class T>
__device__ __forceinline__ void add_entries(
    const int32_t* inner, const wide_t<T>* value, int32_t n, const Matrix<const T>& basis,
    int64_t col, wide_t<T> (&sum)[kVector]) {
  const T* const data = basis.data + col * basis.col_stride;
#pragma unroll 1
  for (int32_t e = 0; e < n; e += kBatch) {
    Pack<T, kVector> rows[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (e + b < n) {
        rows[b] = *reinterpret_cast<const Pack<T, kVector>*>(
            data + inner[e + b] * basis.row_stride);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (e + b < n) {
        const wide_t<T> factor = value[e + b];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          sum[j] += factor * static_cast<wide_t<T>>(rows[b].at[j]);
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ bool is_entry(T value) {
  return static_cast<wide_t<T>>(value) != 0;  // NaN is one
}

__device__ __forceinline__ uint32_t lanes_below() {
  return (1u << threadIdx.x % 32) - 1;
}

}  // namespace
}  // namespace sparsegrad
