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

// By the last block: found(bin, k) by one thread, the k-th largest being the k-th of those in `bin`;
// by none where there are fewer.
template <class F>
__device__ void find_bin(const Count* counts, long long k, Room& room, const F& found) {
  constexpr int kEach = kBins / kTopkThreads;
  const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  Count own[kEach];
  long long sum = 0;
  for (int e = 0; e < kEach; ++e) {
    own[e] = __ldcg(counts + highest - (kEach - 1) + e);
    sum += static_cast<long long>(own[e]);
  }
  long long above, total;
  Scan(room.scan).ExclusiveSum(sum, above, total);
  __syncthreads();  // all have read `progress`
  if (above < k && k <= above + sum) {
    const Picked picked = pick_digit(own, kEach - 1, k - above);
    found(highest - (kEach - 1) + picked.digit, static_cast<Count>(picked.k));
  }
}

// By the last block, from the counts of all: digit d of the k-th largest.
template <class Key>
__device__ void find_digit(const Selection<Key>& s, int d, Room& room) {
  const long long k = d == 0 ? s.k : static_cast<long long>(s.progress->k);
  const Count prefix = d == 0 ? 0 : s.progress->prefix;
  find_bin(s.counts + d * kBins, k, room, [&](int digit, Count k_of_digit) {
    const int width = shift_of<Key>(d - 1) - shift_of<Key>(d);
    s.progress->prefix = prefix << width | static_cast<Count>(digit);
    s.progress->k = k_of_digit;
  });
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

// Room for a chunk's candidates, of which a lane has `own`: its place, or -1 where none is left.
template <class Key>
__device__ int64_t reserve(const Selection<Key>& s, int chunk, unsigned int own) {
  const int64_t size = __reduce_add_sync(~0u, own);
  long long place = 0;
  if (threadIdx.x % 32 == 0) {
    if (size != 0) {
      place =
          static_cast<long long>(atomicAdd(&s.progress->reserved, static_cast<Count>(size)));
    }
    place = place + size <= s.capacity ? place : -1;
    s.places[chunk] = place;
    s.n_stored[chunk] = size;
  }
  return __shfl_sync(~0u, place, 0);
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

    int64_t place = reserve(s, chunk, own);
    if (place < 0 || !__any_sync(~0u, own != 0)) {
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

// count(counts) in shared memory, which is then added to that of all blocks.
template <class F>
__device__ void count_in_block(unsigned int* counts, Count* counts_of_all, const F& count) {
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    counts[b] = 0;
  }
  __syncthreads();
  count(counts);
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    if (counts[b] != 0) {
      atomicAdd(counts_of_all + b, static_cast<Count>(counts[b]));
    }
  }
}

// The d-th digit of those that may be the k-th largest is counted. `stored`: they already are.
template <class Key>
__device__ void count(const Selection<Key>& s, int d, bool stored, unsigned int* counts) {
  count_in_block(counts, s.counts + d * kBins, [&](unsigned int* own) {
    if (stored || d > 1) {
      count_next(s, d, own);
    } else if (d == 0) {
      count_first(s, own);
    } else {
      collect(s, own);
    }
  });
}

// ---- Near a threshold ----

// What 16-bit ranks have above the threshold's fits one histogram: the k-th largest is known at
// once. Of longer ones the first digit is counted.
template <class Key>
constexpr bool kOneHistogram = sizeof(Key) == 2;

template <class Key>
__device__ int bin_near(Key rank, Key lowest) {
  if constexpr (kOneHistogram<Key>) {
    return min(static_cast<int>(rank) - static_cast<int>(lowest), kBins - 1);
  } else {
    return digit_of(rank, 0);
  }
}

// The rank from which on entries are candidates; 0: the threshold is none.
template <class Key>
__device__ Key lowest_rank(const Selection<Key>& s) {
  const float threshold = *s.threshold;
  return 0.0f < threshold && threshold < INFINITY ? s.rank_at_most(threshold) : Key{0};
}

template <class Key>
__device__ Pack<Key> load_pack(const Selection<Key>& s, int64_t position) {
  constexpr int n = Pack<Key>::size;
  if (position + n <= s.n) {
    return *reinterpret_cast<const Pack<Key>*>(s.c.data + position);
  }
  Pack<Key> pack{};
  for (int v = 0; v < n; ++v) {
    if (position + v < s.n) {
      pack.at[v] = s.c.data[position + v];
    }
  }
  return pack;
}

// Stores the entries of `lowest` rank and above, of a packed matrix in chunks of the least size,
// and counts them.
template <class Key>
__device__ void collect_near(const Selection<Key>& s, Key lowest, unsigned int* counts) {
  constexpr int n = Pack<Key>::size, kRuns = kMinChunk / (32 * n);
  static_assert(kRuns * n == 32);  // of a chunk a lane has as many as a mask has bits
  const int lane = threadIdx.x % 32;
  for_chunks_of_warp(s, [&](int chunk) {
    const int64_t begin = chunk * kMinChunk + lane * n;
    uint32_t taken = 0;
#pragma unroll 4
    for (int r = 0; r < kRuns; ++r) {
      const Pack<Key> pack = load_pack(s, begin + r * 32 * n);
      uint32_t mask = 0;
#pragma unroll
      for (int v = 0; v < n; ++v) {
        mask |= static_cast<uint32_t>(rank_of(pack.at[v], s.infinity) >= lowest) << v;
      }
      taken |= mask << r * n;
    }
    int64_t place = reserve(s, chunk, __popc(taken));
#pragma unroll 1
    for (int r = 0; r < kRuns; ++r, taken >>= n) {
      const uint32_t mask = taken & ((1u << n) - 1);
      if (!__any_sync(~0u, mask != 0)) {
        continue;
      }
      const Order order = order_of<n>(mask);
      const Pack<Key> pack = load_pack(s, begin + r * 32 * n);  // from the cache
      int64_t at = place + order.before;
#pragma unroll
      for (int v = 0; v < n; ++v) {
        if (mask >> v & 1) {
          atomicAdd(counts + bin_near(rank_of(pack.at[v], s.infinity), lowest), 1u);
          if (place >= 0) {
            s.stored_bits[at] = pack.at[v];
            s.stored_offsets[at++] = (r * 32 + lane) * n + v;
          }
        }
      }
      place += place >= 0 ? order.total : 0;
    }
  });
}

// By the last block: whether the candidates hold the k largest, and what is known of the k-th.
template <class Key>
__device__ void judge_near(const Selection<Key>& s, Key lowest, Room& room) {
  if (threadIdx.x == 0) {
    s.progress->is_near = 0;
  }
  find_bin(s.counts + kDigits<Key> * kBins, s.k, room, [&](int bin, Count k_of_bin) {
    if (kOneHistogram<Key> && bin == kBins - 1) {  // of this rank or any above
      return;
    }
    s.progress->prefix = (kOneHistogram<Key> ? lowest : Count{0}) + static_cast<Count>(bin);
    s.progress->k = k_of_bin;
    s.progress->is_near = 1;
  });
  __syncthreads();
  if (threadIdx.x == 0 && s.progress->is_near == 0) {
    s.progress->reserved = 0;  // all is done again
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
  constexpr int kEach = 8;  // whose loads a thread waits for together
  long long before_all = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += kTopkThreads * kEach) {
    const int begin = first + static_cast<int>(threadIdx.x) * kEach;
    long long own[kEach], sum = 0, before, total;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      own[e] = begin + e < n ? __ldcg(sizes + begin + e) : 0;
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      sum += own[e];
    }
    Scan(room.scan).ExclusiveSum(sum, before, total);
    __syncthreads();  // `room` is used again
    before += before_all;
    before_all += total;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (begin + e < n) {
        sizes[begin + e] = before;
      }
      before += own[e];
    }
  }
}

// The threshold for the next call: kSlack times the k-th largest magnitude. All have read this one.
template <class Key>
__device__ void carry_threshold(const Selection<Key>& s, Key rank) {
  if (s.threshold != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *s.threshold = rank <= s.infinity ? kSlack * s.magnitude_of(rank) : INFINITY;
  }
}

template <class Key>
__device__ void write(const Selection<Key>& s, int64_t* indices, Key* values) {
  const Key threshold = static_cast<Key>(s.progress->prefix);
  carry_threshold(s, threshold);
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
    const Selection<Key>& s, int phase, bool stored, Room& room, int64_t* indices, Key* values) {
  if (phase < kCountKept<Key>) {
    count(s, phase, stored, room.counts);
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
