// How sums become elements: to the nearest, or up or down by chance, so that they are right on
// average.
#pragma once

#include "../rounding.h"
#include "common.cuh"

namespace sparsegrad {

// kParts: in how many elements of T a factor of the sum is held, so that it is exact enough.

template <class T>
struct RoundNearest {
  static constexpr int kParts = 1;

  __device__ T operator()(wide_t<T> sum, T /*old*/, int64_t /*element*/) const {
    return static_cast<T>(sum);
  }
};

template <class T>
struct RoundStochastic {
  static constexpr int kParts = 2;
  const int64_t* seed;

  __device__ T operator()(float sum, T old, int64_t element) const {
    return round_stochastically(sum, old, element, *seed);
  }
};

}  // namespace sparsegrad
