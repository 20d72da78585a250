// How sums become elements: to the nearest, or up or down by chance, so that they are right on
// average.
#pragma once

#include "common.cuh"

namespace sparsegrad {

template <class T>
struct RoundNearest {
  __device__ T operator()(wide_t<T> sum, int64_t /*element*/) const {
    return static_cast<T>(sum);
  }
};

}  // namespace sparsegrad
