// Stochastic rounding of float32 to bfloat16 or float16: the same bits on the CPU and on CUDA, those
// of ops/_rounding.py.
#pragma once

#include "common.h"

#include <torch/headeronly/macros/Macros.h>

namespace sparsegrad {

// 32 random bits for a position: the first word of Philox 4x32-10.
SPARSEGRAD_INLINE C10_HOST_DEVICE inline uint32_t philox(uint64_t position, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
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
// what lies beyond the largest finite number go to the nearest.
template <class T>
SPARSEGRAD_INLINE C10_HOST_DEVICE inline T round_stochastically(
    float sum, T old, uint64_t position, uint64_t seed) {
  static_assert(sizeof(T) == 2);
  constexpr bool kHalf = std::is_same_v<T, Half>;
  const float before = static_cast<float>(old);
  if (sum == before || before != before) {
    return old;
  }
  const float size = fabsf(sum);
  if (!(size <= (kHalf ? 65504.0f : 3.3895313892515355e38f))) {
    return static_cast<T>(sum);
  }
  const uint32_t random = philox(position, seed);
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

}  // namespace sparsegrad
