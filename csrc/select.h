// Selection by magnitude, digit by digit: what the CPU's and the CUDA kernels have in common.
//
// constexpr is what nvcc lets device code call.
#pragma once

#include <cstdint>
#include <limits>

#define SPARSEGRAD_INLINE __attribute__((always_inline))  // as in common.h

namespace sparsegrad {

// `bits` are the bits of floats of which `infinity` is infinity; all NaNs are equal and above it.
template <class Key>
SPARSEGRAD_INLINE constexpr Key rank_of(Key bits, Key infinity) {
  const Key magnitude = bits & std::numeric_limits<Key>::max();
  return magnitude > infinity ? static_cast<Key>(infinity + 1) : magnitude;
}

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

template <class Key>
constexpr int kDigits = (std::numeric_limits<Key>::digits + kDigitBits - 1) / kDigitBits;

// rank >> shift_of<Key>(d) are the digits 0 to d, from the highest one; the last may be shorter.
template <class Key>
constexpr int shift_of(int d) {
  const int shift = std::numeric_limits<Key>::digits - kDigitBits * (d + 1);
  return shift > 0 ? shift : 0;
}

template <class Key>
constexpr int digit_of(Key rank, int d) {
  const int width = shift_of<Key>(d - 1) - shift_of<Key>(d);
  return static_cast<int>(rank >> shift_of<Key>(d)) & ((1 << width) - 1);
}

struct Picked {
  int digit;
  int64_t k;  // the k-th largest is the k-th among those of this digit
};

// The digit of the k-th largest, of which `counts` are known to hold k at or below `highest`.
template <class Count>
constexpr Picked pick_digit(const Count* counts, int highest, int64_t k) {
  while (k > static_cast<int64_t>(counts[highest])) {
    k -= static_cast<int64_t>(counts[highest--]);
  }
  return {highest, k};
}

// Is an entry among the k largest? `equals_before`: entries equal to the threshold that precede it.
template <class Key>
constexpr bool is_kept(Key rank, Key threshold, int64_t equals_before, int64_t n_equal) {
  return rank > threshold || (rank == threshold && equals_before < n_equal);
}

// Where the entries kept of a part begin, from the counts of all parts that precede it.
constexpr int64_t output_begin(int64_t above, int64_t equal, int64_t n_equal) {
  return above + (equal < n_equal ? equal : n_equal);
}

}  // namespace sparsegrad
