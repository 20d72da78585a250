// The epilogue that keeps of a product what reaches a threshold, and drops the rest unwritten.
#pragma once

#include "product.cuh"
#include "shortlist.cuh"

namespace sparsegrad {

template <class T>
struct CollectProduct {
  const float* threshold;
  int32_t n_cols;
  // The kept, in no order: row * n_cols + col and the value.
  int64_t* linear;  // [capacity]
  T* values;        // [capacity]
  int64_t capacity;
  ShortlistState* state;

  __device__ void before(int32_t) const {}

  // A warp's threads count theirs, take room for all with one atomic addition, and write.
  template <class Visit>
  __device__ void operator()(const Visit& visit) const {
    const wide_t<T> lower = *threshold;
    // Of the values as they would be stored; NaN is kept.
    const auto is_kept = [&](T value) { return !(fabs(static_cast<wide_t<T>>(value)) < lower); };
    unsigned kept = 0;
    visit([&](int32_t, int32_t, auto value, auto next, bool has_next) {
      kept += is_kept(static_cast<T>(value));
      kept += has_next && is_kept(static_cast<T>(next));
    });

    const int lane = threadIdx.x % 32;
    unsigned until = kept;  // the kept of this lane and those before
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned before = __shfl_up_sync(~0u, until, step);
      until += lane >= step ? before : 0;
    }
    unsigned long long first = 0;
    if (lane == 31 && until > 0) {
      first = atomicAdd(&state->count, static_cast<unsigned long long>(until));
    }
    int64_t at = static_cast<int64_t>(__shfl_sync(~0u, first, 31)) + until - kept;
    if (kept == 0) {
      return;
    }
    const auto append = [&](int64_t index, T value) {
      if (is_kept(value) && at < capacity) {
        linear[at] = index;
        values[at] = value;
        ++at;
      }
    };
    visit([&](int32_t row, int32_t col, auto value, auto next, bool has_next) {
      const int64_t index = int64_t{row} * n_cols + col;
      append(index, static_cast<T>(value));
      if (has_next) {
        append(index + 1, static_cast<T>(next));
      }
    });
  }
};

// Compiled once, with the products that are stored: in products.cu.
template <class T>
void collect_product(const Tensor& like, const Product<T>& p, const CollectProduct<T>& epilogue);

}  // namespace sparsegrad
