// Selection of the k largest magnitudes on the device: its state, and how its kernels walk entries.
//
// The matrix is cut in chunks of adjacent linear indices, each the work of one warp. A chunk's
// entries that may be among the k largest are stored together, in order, where room is left; a
// chunk for which there is none is read from the matrix again. So the result is the same whatever
// the order in which chunks find room, and exact even if all entries are equal.
//
// A shortlist is gone through as if it were a contiguous matrix, of as many entries as it has.
#pragma once

#include <cuda_fp16.h>

#include "../select.h"
#include "pack.cuh"
#include "shortlist.cuh"

namespace sparsegrad {
namespace {

constexpr int kTopkThreads = 512;
constexpr int kTopkWarps = kTopkThreads / 32;
constexpr int64_t kMinChunk = 1024;
constexpr int kMaxChunks = 1 << 14;  // what the last block adds up
constexpr int64_t kCandidateSlack = 1 << 16;
// Near a threshold: of normally distributed entries 4 times as many reach 0.8 of it for 1% of them.
constexpr int64_t kPerEntryNear = 8;
constexpr int kMaxSteps = 9;  // from a phase to the next
constexpr float kSlack = 0.8f;  // SLACK of ops/topk_coo.py

using Count = unsigned long long;  // what atomicAdd takes

struct Progress {
  Count prefix;  // the digits known of the k-th largest rank
  Count k;       // the k-th largest is the k-th of those that share them
  Count reserved;
  int32_t is_near;  // whether what reaches the threshold holds the k largest
  unsigned int finished[kMaxSteps], opened[kMaxSteps];  // by phase
};

template <class Key>
struct Selection {
  Matrix<const Key> c;
  bool packed;  // contiguous, and aligned to packs
  Key infinity;
  int64_t n, k, chunk_size, capacity;
  int n_chunks;
  Shortlist shortlist;
  int64_t shortlist_chunk_size;
  const int64_t* linear;  // of the shortlist's entries; null: a matrix's, which are their own
  float* threshold;       // null: none; nearly that of the k-th largest, then the next call's

  Progress* progress;
  Count* counts;               // [digits + 1, kBins]
  int64_t *places, *n_stored;  // [chunks]; a place of -1: not stored
  int64_t *above, *equal;      // [chunks]: how many are kept at most; then, in the chunks before
  Key* stored_bits;            // [capacity]
  uint32_t* stored_offsets;    // [capacity], from the chunk's begin

  __device__ int64_t row_of(int64_t linear) const {
    // 32-bit division is several times as fast.
    return linear <= UINT32_MAX && c.cols <= UINT32_MAX
               ? static_cast<uint32_t>(linear) / static_cast<uint32_t>(c.cols)
               : linear / c.cols;
  }

  // Key does not tell bfloat16 from float16; its infinity does.
  __device__ bool is_half() const {
    return infinity == 0x7c00;
  }
  __device__ float magnitude_of(Key rank) const {
    if constexpr (sizeof(Key) == 2) {
      return is_half() ? __half2float(__ushort_as_half(rank))
                       : __uint_as_float(static_cast<uint32_t>(rank) << 16);
    } else if constexpr (sizeof(Key) == 4) {
      return __uint_as_float(rank);
    } else {
      return static_cast<float>(__longlong_as_double(static_cast<long long>(rank)));
    }
  }
  __device__ Key rank_at_most(float magnitude) const {
    if constexpr (sizeof(Key) == 2) {
      return is_half() ? __half_as_ushort(__float2half_rz(magnitude))
                       : static_cast<Key>(__float_as_uint(magnitude) >> 16);
    } else if constexpr (sizeof(Key) == 4) {
      return __float_as_uint(magnitude);
    } else {
      return static_cast<Key>(__double_as_longlong(static_cast<double>(magnitude)));
    }
  }
};

// From here on it is the shortlist that is selected from, where it holds the k largest.
template <class Key>
__device__ void prefer_shortlist(Selection<Key>& s) {
  if (s.shortlist.state == nullptr || s.shortlist.state->whole != 0) {
    return;
  }
  s.c.data = static_cast<const Key*>(s.shortlist.values);
  s.c.row_stride = s.c.cols;
  s.c.col_stride = 1;
  s.packed = true;
  s.n = static_cast<int64_t>(s.shortlist.state->count);
  s.chunk_size = s.shortlist_chunk_size;
  s.n_chunks = static_cast<int>(num_blocks(s.n, s.chunk_size));
  s.linear = s.shortlist.linear;
}

// A lane's adjacent entries of a chunk, of which the first `size` are there. They stay as they were
// loaded until they are used: to take them apart is to wait for them.
template <class Key, int n>
struct Run {
  std::conditional_t<n == 1, Key, uint4> loaded;
  int size;
  uint32_t offset;  // from the chunk's begin

  __device__ Pack<Key, n> bits() const {
    return __builtin_bit_cast(Pack<Key, n>, loaded);
  }

  // f(inside, bits) for each, there or not: all lanes call f equally often.
  template <class F>
  __device__ void for_each(const F& f) const {
    const Pack<Key, n> pack = bits();
#pragma unroll
    for (int v = 0; v < n; ++v) {
      f(v < size, pack.at[v]);
    }
  }

  // A bit for each that is there and of which f(bits).
  template <class F>
  __device__ uint32_t mask(const F& f) const {
    const Pack<Key, n> pack = bits();
    uint32_t mask = 0;
#pragma unroll
    for (int v = 0; v < n; ++v) {
      mask |= static_cast<uint32_t>(v < size && f(pack.at[v])) << v;
    }
    return mask;
  }
};

template <int n, class Key>
__device__ Run<Key, n> load_run(
    const Selection<Key>& s, int64_t begin, uint32_t offset, uint32_t length) {
  Run<Key, n> run{{}, 0, offset};
  if (offset >= length) {
    return run;
  }
  const int64_t position = begin + offset;
  run.size = static_cast<int>(length - offset < n ? length - offset : n);
  if (s.packed && run.size == n) {
    run.loaded = *reinterpret_cast<const decltype(run.loaded)*>(s.c.data + position);
    return run;
  }
  Pack<Key, n> pack{};
  int64_t i = s.row_of(position), j = position - i * s.c.cols;
#pragma unroll
  for (int v = 0; v < n; ++v) {
    if (v < run.size) {
      pack.at[v] = s.c(i, j);
    }
    if (++j == s.c.cols) {
      j = 0;
      ++i;
    }
  }
  run.loaded = __builtin_bit_cast(decltype(run.loaded), pack);
  return run;
}

// take(run) for the entries of a chunk in the order of lanes, by all of them, runs being of n. The
// next run is loaded meanwhile.
template <int n, class Key, class Take>
__device__ void for_matrix(const Selection<Key>& s, int chunk, const Take& take) {
  constexpr uint32_t kStep = 32 * n;
  const int64_t begin = chunk * s.chunk_size;
  const uint32_t length =
      static_cast<uint32_t>(s.chunk_size < s.n - begin ? s.chunk_size : s.n - begin);
  const uint32_t own = threadIdx.x % 32 * n;
  Run<Key, n> run = load_run<n>(s, begin, own, length);
#pragma unroll 1
  for (uint32_t first = 0; first < length; first += kStep) {
    const Run<Key, n> next = load_run<n>(s, begin, first + kStep + own, length);
    take(run);
    run = next;
  }
}

// take(inside, bits, offset) for those that may be among the k largest, and perhaps others, in
// order, 32 at a time by all lanes.
template <class Key, class Take>
__device__ void for_candidates(const Selection<Key>& s, int chunk, const Take& take) {
  const int64_t place = s.places[chunk];
  if (place < 0) {
    for_matrix<1>(s, chunk, [&](const auto& run) { take(run.size != 0, run.loaded, run.offset); });
    return;
  }
  const uint32_t size = static_cast<uint32_t>(s.n_stored[chunk]);
  const Key* const bits = s.stored_bits + place;
  const uint32_t* const offsets = s.stored_offsets + place;
  for (uint32_t first = 0; first < size; first += 32) {
    const uint32_t e = first + threadIdx.x % 32;
    const bool inside = e < size;
    take(inside, inside ? bits[e] : Key{0}, inside ? offsets[e] : 0);
  }
}

// Of the entries that the lanes' masks of n bits choose, in the order of lanes: how many come
// before this lane's, and of how many.
struct Order {
  int before, total;
};

template <int n>
__device__ Order order_of(uint32_t mask) {
  const uint32_t lower_lanes = (1u << threadIdx.x % 32) - 1;
  Order order{};
#pragma unroll
  for (int v = 0; v < n; ++v) {
    const uint32_t votes = __ballot_sync(~0u, mask >> v & 1);
    order.before += __popc(votes & lower_lanes);
    order.total += __popc(votes);
  }
  return order;
}

// f(chunk) by whole warps.
template <class Key, class F>
__device__ void for_chunks_of_warp(const Selection<Key>& s, const F& f) {
  int chunk = static_cast<int>(blockIdx.x * kTopkWarps + threadIdx.x / 32);
  for (; chunk < s.n_chunks; chunk += static_cast<int>(gridDim.x) * kTopkWarps) {
    f(chunk);
  }
}

}  // namespace
}  // namespace sparsegrad
