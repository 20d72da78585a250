// How sums become elements: to the nearest, or up or down by chance, so that they are right on
// average.
#pragma once

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

// 32 random bits for a position: the first word of Philox 4x32-10.
__device__ inline uint32_t philox(uint64_t position, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{c0} * 0xD2511F53u, b = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Away from zero with the share of the gap between the two neighbours by which the sum is above
// the lower. What is representable, and what equals the old element, stays; NaN, infinities and
// what lies beyond the largest finite number go to the nearest. The bits are those of
// ops/_rounding.py.
template <class T>
struct RoundStochastic {
  static_assert(sizeof(T) == 2);
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr int kParts = 2;
  const int64_t* seed;

  __device__ T operator()(float sum, T old, int64_t element) const {
    const float before = static_cast<float>(old);
    if (sum == before || before != before) {
      return old;
    }
    const float size = fabsf(sum);
    if (!(size <= (kHalf ? 65504.0f : 3.3895313892515355e38f))) {
      return static_cast<T>(sum);
    }
    const uint32_t random = philox(static_cast<uint64_t>(element), static_cast<uint64_t>(*seed));
    if (kHalf && size < 0x1p-14f) {  // float16 is spaced evenly here
      const float steps = size * 0x1p24f, whole = floorf(steps);
      const float up = static_cast<float>(random >> 8) * 0x1p-24f < steps - whole ? 1.0f : 0.0f;
      return static_cast<T>(copysignf((whole + up) * 0x1p-24f, sum));
    }
    constexpr int kDropped = kHalf ? 13 : 16;  // bits that float32 has beyond T
    const uint32_t bits = std::bit_cast<uint32_t>(sum), low = bits & ((1u << kDropped) - 1);
    const uint32_t up = (random >> (32 - kDropped)) < low ? 1u << kDropped : 0u;
    return static_cast<T>(std::bit_cast<float>(bits - low + up));
  }
};

}  // namespace sparsegrad
