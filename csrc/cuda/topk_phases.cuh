// The phases of the selection, in order: what all blocks do, and what the last one prepares then.
//
// A chunk is the same warp's in all phases of a launch. What other blocks wrote is read after all
// have come to the end of a phase: `progress` and counts, and above and equal.
#pragma once

#include "topk.cuh"

#include <cub/block/block_scan.cuh>

namespace sparsegrad {
namespace {

using Scan = cub::BlockScan<long long, kTopkThreads, cub::BLOCK_SCAN_WARP_SCANS>;

// Shared memory of a phase, and of the last block's step after it.
union Room {
  unsigned int counts[kBins];
  typename Scan::TempStorage scan;
};

template <class Key>
constexpr int kCountKept = kDigits<Key>;  // the phases before find a digit each
template <class Key>
constexpr int kWrite = kCountKept<Key> + 1;

// One more of `digit` for each lane that counts. Where most entries are zero most lanes agree:
// those that agree with the first one are added at once.
inline __device__ void count_digit(unsigned int* counts, bool counted, int digit) {
  const uint32_t mask = __ballot_sync(~0u, counted);
  if (mask == 0) {
    return;
  }
  const int first = __ffs(mask) - 1;
  const int first_digit = __shfl_sync(~0u, digit, first);  // by all lanes, counted or not
  const bool agrees = counted && digit == first_digit;
  const uint32_t agreed = __ballot_sync(~0u, agrees);
  if (static_cast<int>(threadIdx.x % 32) == first) {
    atomicAdd(counts + digit, static_cast<unsigned int>(__popc(agreed)));
  } else if (counted && !agrees) {
    atomicAdd(counts + digit, 1u);
  }
}

// By the last block, from the counts of all: digit d of the k-th largest.
template <class Key>
__device__ void find_digit(const Selection<Key>& s, int d, Room& room) {
  constexpr int kEach = kBins / kTopkThreads;
  const Count* counts = s.counts + d * kBins;
  const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  Count own[kEach];
  long long sum = 0;
  for (int e = 0; e < kEach; ++e) {
    own[e] = __ldcg(counts + highest - (kEach - 1) + e);
    sum += static_cast<long long>(own[e]);
  }
  const long long k = d == 0 ? s.k : static_cast<long long>(s.progress->k);
  const Count prefix = d == 0 ? 0 : s.progress->prefix;
  long long above, total;
  Scan(room.scan).ExclusiveSum(sum, above, total);
  __syncthreads();  // all have read `progress`
  if (above < k && k <= above + sum) {
    const Picked picked = pick_digit(own, kEach - 1, k - above);
    const int digit = highest - (kEach - 1) + picked.digit;
    const int width = shift_of<Key>(d - 1) - shift_of<Key>(d);
    s.progress->prefix = prefix << width | static_cast<Count>(digit);
    s.progress->k = static_cast<Count>(picked.k);
  }
}

template <class Key>
__device__ void count_first(const Selection<Key>& s, unsigned int* counts) {
  for_chunks_of_warp(s, [&](int chunk) {
    for_matrix<Pack<Key>::size>(s, chunk, [&](const auto& run) {
      run.for_each([&](bool inside, Key bits) {
        count_digit(counts, inside, digit_of(rank_of(bits, s.infinity), 0));
      });
    });
  });
}

// Stores the candidates, and counts their second digit.
template <class Key>
__device__ void collect(const Selection<Key>& s, unsigned int* counts) {
  constexpr int shift = shift_of<Key>(0);
  const Key prefix = static_cast<Key>(s.progress->prefix);
  for_chunks_of_warp(s, [&](int chunk) {
    unsigned int own = 0;
    for_matrix<Pack<Key>::size>(s, chunk, [&](const auto& run) {
      run.for_each([&](bool inside, Key bits) {
        const Key rank = rank_of(bits, s.infinity);
        own += inside && (rank >> shift) >= prefix;
        count_digit(counts, inside && (rank >> shift) == prefix, digit_of(rank, 1));
      });
    });

    const int64_t size = __reduce_add_sync(~0u, own);
    long long place = 0;
    if (threadIdx.x % 32 == 0) {
      if (size != 0) {
        place = static_cast<long long>(
            atomicAdd(&s.progress->reserved, static_cast<Count>(size)));
      }
      place = place + size <= s.capacity ? place : -1;
      s.places[chunk] = place;
      s.n_stored[chunk] = size;
    }
    place = __shfl_sync(~0u, place, 0);
    if (size == 0 || place < 0) {
      return;
    }
    for_matrix<Pack<Key>::size>(s, chunk, [&](const auto& run) {  // from the cache
      const uint32_t taken =
          run.mask([&](Key bits) { return (rank_of(bits, s.infinity) >> shift) >= prefix; });
      if (!__any_sync(~0u, taken != 0)) {
        return;
      }
      const Order order = order_of<Pack<Key>::size>(taken);
      int64_t at = place + order.before;
      const auto bits = run.bits();
#pragma unroll
      for (int v = 0; v < bits.size; ++v) {
        if (taken >> v & 1) {
          s.stored_bits[at] = bits.at[v];
          s.stored_offsets[at++] = run.offset + v;
        }
      }
      place += order.total;
    });
  });
}

template <class Key>
__device__ void count_next(const Selection<Key>& s, int d, unsigned int* counts) {
  const int shift = shift_of<Key>(d - 1);
  const Key prefix = static_cast<Key>(s.progress->prefix);
  for_chunks_of_warp(s, [&](int chunk) {
    for_candidates(s, chunk, [&](bool inside, Key bits, uint32_t) {
      const Key rank = rank_of(bits, s.infinity);
      count_digit(counts, inside && (rank >> shift) == prefix, digit_of(rank, d));
    });
  });
}

// The d-th digit of those that may be the k-th largest is counted.
template <class Key>
__device__ void count(const Selection<Key>& s, int d, unsigned int* counts) {
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    counts[b] = 0;
  }
  __syncthreads();
  if (d == 0) {
    count_first(s, counts);
  } else if (d == 1) {
    collect(s, counts);
  } else {
    count_next(s, d, counts);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    if (counts[b] != 0) {
      atomicAdd(s.counts + d * kBins + b, static_cast<Count>(counts[b]));
    }
  }
}

// How many entries each chunk has above the k-th largest, and equal to it.
template <class Key>
__device__ void count_kept(const Selection<Key>& s) {
  const Key threshold = static_cast<Key>(s.progress->prefix);
  for_chunks_of_warp(s, [&](int chunk) {
    unsigned int above = 0, equal = 0;
    for_candidates(s, chunk, [&](bool inside, Key bits, uint32_t) {
      const Key rank = rank_of(bits, s.infinity);
      above += inside && rank > threshold;
      equal += inside && rank == threshold;
    });
    above = __reduce_add_sync(~0u, above);
    equal = __reduce_add_sync(~0u, equal);
    if (threadIdx.x % 32 == 0) {
      s.above[chunk] = above;
      s.equal[chunk] = equal;
    }
  });
}

// By the last block: the sizes become the sums over those before.
inline __device__ void sum_before(int64_t* sizes, int n, Room& room) {
  const int each = (n + kTopkThreads - 1) / kTopkThreads;
  const int begin = static_cast<int>(threadIdx.x) * each;
  const int end = begin + each < n ? begin + each : n;
  long long sum = 0, before, total;
  for (int c = begin; c < end; ++c) {
    sum += __ldcg(sizes + c);
  }
  Scan(room.scan).ExclusiveSum(sum, before, total);
  __syncthreads();  // `room` is used again
  for (int c = begin; c < end; ++c) {
    const int64_t size = __ldcg(sizes + c);
    sizes[c] = before;
    before += size;
  }
}

template <class Key>
__device__ void write(const Selection<Key>& s, int64_t* indices, Key* values) {
  const Key threshold = static_cast<Key>(s.progress->prefix);
  const int64_t n_equal = static_cast<int64_t>(s.progress->k);
  const uint32_t lower_lanes = (1u << threadIdx.x % 32) - 1;
  for_chunks_of_warp(s, [&](int chunk) {
    int64_t equal = s.equal[chunk];
    int64_t at = output_begin(s.above[chunk], equal, n_equal);
    for_candidates(s, chunk, [&](bool inside, Key bits, uint32_t offset) {
      const Key rank = rank_of(bits, s.infinity);
      const uint32_t equals = __ballot_sync(~0u, inside && rank == threshold);
      const bool kept =
          inside && is_kept(rank, threshold, equal + __popc(equals & lower_lanes), n_equal);
      const uint32_t mask = __ballot_sync(~0u, kept);
      if (kept) {
        const int64_t position = chunk * s.chunk_size + offset;
        const int64_t linear = s.linear == nullptr ? position : s.linear[position];
        const int64_t e = at + __popc(mask & lower_lanes), i = s.row_of(linear);
        indices[e] = i;
        indices[s.k + e] = linear - i * s.c.cols;
        values[e] = bits;
      }
      at += __popc(mask);
      equal += __popc(equals);
    });
  });
}

template <class Key>
__device__ void run_phase(
    const Selection<Key>& s, int phase, Room& room, int64_t* indices, Key* values) {
  if (phase < kCountKept<Key>) {
    count(s, phase, room.counts);
  } else if (phase == kCountKept<Key>) {
    count_kept(s);
  } else {
    write(s, indices, values);
  }
}

// By the last block, after each phase but `write`.
template <class Key>
__device__ void prepare_next(const Selection<Key>& s, int phase, Room& room) {
  if (phase < kCountKept<Key>) {
    find_digit(s, phase, room);
  } else {
    sum_before(s.above, s.n_chunks, room);
    sum_before(s.equal, s.n_chunks, room);
  }
}

}  // namespace
}  // namespace sparsegrad
