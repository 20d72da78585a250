// Selection of the k largest magnitudes on the device: its state, and how its kernels walk entries.
//
// The matrix is cut in chunks of adjacent linear indices, each the work of one warp. A chunk's
// entries that may be among the k largest are stored together, in order, where room is left; a chunk
// for which there is none is read from the matrix again. So the result is the same whatever the order
// in which chunks find room, and exact even if all entries are equal.
//
// A shortlist is gone through as if it were a contiguous matrix, of as many entries as it has.
#pragma once

#include "../select.h"
#include "last_block.cuh"
#include "shortlist.cuh"

namespace sparsegrad {
namespace {

constexpr int kTopkThreads = 512;
constexpr int kTopkWarps = kTopkThreads / 32;
constexpr int64_t kMinChunk = 1024;
constexpr int64_t kMaxChunks = 1 << 14;  // what the last block adds up
constexpr int64_t kCandidateSlack = 1 << 16;

using Count = unsigned long long;  // what atomicAdd takes

struct Progress {
  Count prefix;  // the digits known of the k-th largest rank
  Count k;       // the k-th largest is the k-th of those that share them
  Count reserved;
  unsigned int finished[8];  // by launch
};

template <class Key>
struct Selection {
  Matrix<const Key> c;
  bool contiguous;
  Key infinity;
  int64_t n, k, chunk_size, n_chunks, capacity;
  Shortlist shortlist;
  int64_t shortlist_chunk_size;
  const int64_t* linear;  // of the shortlist's entries; null: a matrix's, which are their own

  Progress* progress;
  Count* counts;               // [digits, kBins]
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
  __device__ Key load(int64_t position) const {
    if (contiguous) {
      return c.data[position];
    }
    const int64_t i = row_of(position);
    return c(i, position - i * c.cols);
  }
};

// For every kernel to begin with: from here on it is the shortlist that is selected from, where it
// holds the k largest.
template <class Key>
__device__ void prefer_shortlist(Selection<Key>& s) {
  if (s.shortlist.state == nullptr || s.shortlist.state->whole != 0) {
    return;
  }
  s.c.data = static_cast<const Key*>(s.shortlist.values);
  s.contiguous = true;
  s.n = static_cast<int64_t>(s.shortlist.state->count);
  s.chunk_size = s.shortlist_chunk_size;
  s.n_chunks = num_blocks(s.n, s.chunk_size);
  s.linear = s.shortlist.linear;
}

// take(inside, bits, position) for the entries of a chunk in order, 32 at a time, by all lanes; a
// matrix's position is the linear index.
template <class Key, class Take>
__device__ void for_matrix(const Selection<Key>& s, int64_t chunk, const Take& take) {
  const int64_t begin = chunk * s.chunk_size;
  const int64_t end = begin + s.chunk_size < s.n ? begin + s.chunk_size : s.n;
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t position = first + lane;
    const bool inside = position < end;
    take(inside, inside ? s.load(position) : Key{0}, position);
  }
}

// The same for those that may be among the k largest, and perhaps others.
template <class Key, class Take>
__device__ void for_candidates(const Selection<Key>& s, int64_t chunk, const Take& take) {
  const int64_t place = s.places[chunk], size = s.n_stored[chunk];
  if (place < 0) {
    for_matrix(s, chunk, take);
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int64_t first = 0; first < size; first += 32) {
    const int64_t e = first + lane;
    const bool inside = e < size;
    const int64_t offset = inside ? s.stored_offsets[place + e] : 0;
    take(inside, inside ? s.stored_bits[place + e] : Key{0}, chunk * s.chunk_size + offset);
  }
}

// f(chunk) by whole warps.
template <class Key, class F>
__device__ void for_chunks_of_warp(const Selection<Key>& s, const F& f) {
  int64_t chunk = int64_t{blockIdx.x} * kTopkWarps + threadIdx.x / 32;
  for (; chunk < s.n_chunks; chunk += int64_t{gridDim.x} * kTopkWarps) {
    f(chunk);
  }
}

}  // namespace
}  // namespace sparsegrad
