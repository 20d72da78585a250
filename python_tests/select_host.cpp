// csrc/select.h for test_select.py: the k-th largest as the CUDA kernels find it.
#include "../csrc/select.h"

#include <array>

using namespace sparsegrad;

// kept[i]: is bits[i] among the k largest? `part`: entries that a warp of the kernels would take.
template <class Key>
void select(const Key* bits, int64_t n, int64_t k, Key infinity, int64_t part, int64_t* out) {
  Key prefix = 0;
  for (int d = 0; d < kDigits<Key>; ++d) {
    std::array<int64_t, kBins> counts{};
    for (int64_t i = 0; i < n; ++i) {
      const Key rank = rank_of(bits[i], infinity);
      if (d == 0 || (rank >> shift_of<Key>(d - 1)) == prefix) {
        ++counts[digit_of(rank, d)];
      }
    }
    const Picked picked = pick_digit(counts.data(), kBins - 1, k);
    const int width = shift_of<Key>(d - 1) - shift_of<Key>(d);
    prefix = static_cast<Key>(prefix << width | picked.digit);
    k = picked.k;
  }
  int64_t above = 0, equal = 0;
  for (int64_t begin = 0; begin < n; begin += part) {
    int64_t at = output_begin(above, equal, k);
    for (int64_t i = begin; i < n && i < begin + part; ++i) {
      const Key rank = rank_of(bits[i], infinity);
      if (is_kept(rank, prefix, equal, k)) {
        out[at++] = i;
      }
      above += rank > prefix;
      equal += rank == prefix;
    }
  }
}

#define EXPORT(name, Key)                                                                   \
  extern "C" void name(                                                                     \
      const Key* bits, int64_t n, int64_t k, Key infinity, int64_t part, int64_t* out) {    \
    select(bits, n, k, infinity, part, out);                                                \
  }
EXPORT(select16, int16_t)
EXPORT(select32, int32_t)
EXPORT(select64, int64_t)
