// The k entries of largest magnitude, exact: of equal ones the lowest linear index, NaN on top.
//
// Radix selection, the matrix being read twice. 1: a histogram of the highest digit, which gives that
// of the k-th largest. 2: entries of this digit or above are stored; of those that have it, the next
// digit is counted. The digits that are left, the counts of what each chunk keeps, and the output
// need only what is stored. Each launch's last block prepares the next launch.
#include "topk.cuh"

#include <cub/block/block_scan.cuh>

namespace sparsegrad {
namespace {

using Scan = cub::BlockScan<long long, kTopkThreads>;

// One more of `digit` for each lane that counts. Where most entries are zero most lanes agree: those
// that agree with the first one are added at once.
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
__device__ void find_digit(const Selection<Key>& s, int d) {
  constexpr int kEach = kBins / kTopkThreads;
  __shared__ typename Scan::TempStorage room;
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
  Scan(room).ExclusiveSum(sum, above, total);
  __syncthreads();  // all have read `progress`
  if (above < k && k <= above + sum) {
    const Picked picked = pick_digit(own, kEach - 1, k - above);
    const int digit = highest - (kEach - 1) + picked.digit;
    s.progress->prefix = prefix << (shift_of<Key>(d - 1) - shift_of<Key>(d)) | static_cast<Count>(digit);
    s.progress->k = static_cast<Count>(picked.k);
  }
}

// To be called by all threads once the block has counted.
template <class Key>
__device__ void add_counts(const Selection<Key>& s, int d, const unsigned int* counts) {
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    if (counts[b] != 0) {
      atomicAdd(s.counts + d * kBins + b, static_cast<Count>(counts[b]));
    }
  }
  if (is_last_block(s.progress->finished + d)) {
    find_digit(s, d);
  }
}

inline __device__ void clear_counts(unsigned int* counts) {
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    counts[b] = 0;
  }
  __syncthreads();
}

template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) count_first(Selection<Key> s) {
  prefer_shortlist(s);
  __shared__ unsigned int counts[kBins];
  clear_counts(counts);
  for_chunks_of_warp(s, [&](int64_t chunk) {
    for_matrix(s, chunk, [&](bool inside, Key bits, int64_t) {
      count_digit(counts, inside, digit_of(rank_of(bits, s.infinity), 0));
    });
  });
  add_counts(s, 0, counts);
}

// Stores the candidates, and counts their second digit.
template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) collect(Selection<Key> s) {
  prefer_shortlist(s);
  __shared__ unsigned int counts[kBins];
  clear_counts(counts);
  constexpr int shift = shift_of<Key>(0);
  const Key prefix = static_cast<Key>(s.progress->prefix);
  const int lane = threadIdx.x % 32;
  for_chunks_of_warp(s, [&](int64_t chunk) {
    int64_t size = 0;
    for_matrix(s, chunk, [&](bool inside, Key bits, int64_t) {
      const Key rank = rank_of(bits, s.infinity);
      size += __popc(__ballot_sync(~0u, inside && (rank >> shift) >= prefix));
      count_digit(counts, inside && (rank >> shift) == prefix, digit_of(rank, 1));
    });

    long long place = 0;
    if (lane == 0) {
      place = size == 0 ? 0 : static_cast<long long>(
          atomicAdd(&s.progress->reserved, static_cast<Count>(size)));
      place = place + size <= s.capacity ? place : -1;
      s.places[chunk] = place;
      s.n_stored[chunk] = size;
    }
    place = __shfl_sync(~0u, place, 0);
    if (size == 0 || place < 0) {
      return;
    }
    for_matrix(s, chunk, [&](bool inside, Key bits, int64_t position) {  // from the cache
      const bool taken = inside && (rank_of(bits, s.infinity) >> shift) >= prefix;
      const uint32_t mask = __ballot_sync(~0u, taken);
      if (taken) {
        const int64_t at = place + __popc(mask & ((1u << lane) - 1));
        s.stored_bits[at] = bits;
        s.stored_offsets[at] = static_cast<uint32_t>(position - chunk * s.chunk_size);
      }
      place += __popc(mask);
    });
  });
  add_counts(s, 1, counts);
}

template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) count_next(Selection<Key> s, int d) {
  prefer_shortlist(s);
  __shared__ unsigned int counts[kBins];
  clear_counts(counts);
  const int shift = shift_of<Key>(d - 1);
  const Key prefix = static_cast<Key>(s.progress->prefix);
  for_chunks_of_warp(s, [&](int64_t chunk) {
    for_candidates(s, chunk, [&](bool inside, Key bits, int64_t) {
      const Key rank = rank_of(bits, s.infinity);
      count_digit(counts, inside && (rank >> shift) == prefix, digit_of(rank, d));
    });
  });
  add_counts(s, d, counts);
}

// By the last block: above[chunk] and equal[chunk] become the sums over the chunks before.
template <class Key>
__device__ void sum_before(const Selection<Key>& s) {
  __shared__ typename Scan::TempStorage room;
  const int64_t each = num_blocks(s.n_chunks, kTopkThreads);
  const int64_t begin = threadIdx.x * each;
  const int64_t end = begin + each < s.n_chunks ? begin + each : s.n_chunks;
  for (int64_t* sizes : {s.above, s.equal}) {
    long long sum = 0, before, total;
    for (int64_t c = begin; c < end; ++c) {
      sum += __ldcg(sizes + c);
    }
    Scan(room).ExclusiveSum(sum, before, total);
    __syncthreads();  // `room` is used again
    for (int64_t c = begin; c < end; ++c) {
      const int64_t size = __ldcg(sizes + c);
      sizes[c] = before;
      before += size;
    }
  }
}

template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) count_kept(Selection<Key> s) {
  prefer_shortlist(s);
  const Key threshold = static_cast<Key>(s.progress->prefix);
  for_chunks_of_warp(s, [&](int64_t chunk) {
    int64_t above = 0, equal = 0;
    for_candidates(s, chunk, [&](bool inside, Key bits, int64_t) {
      const Key rank = rank_of(bits, s.infinity);
      above += __popc(__ballot_sync(~0u, inside && rank > threshold));
      equal += __popc(__ballot_sync(~0u, inside && rank == threshold));
    });
    if (threadIdx.x % 32 == 0) {
      s.above[chunk] = above;
      s.equal[chunk] = equal;
    }
  });
  if (is_last_block(s.progress->finished + kDigits<Key>)) {
    sum_before(s);
  }
}

template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) write(
    Selection<Key> s, int64_t* __restrict__ indices, Key* __restrict__ values) {
  prefer_shortlist(s);
  const Key threshold = static_cast<Key>(s.progress->prefix);
  const int64_t n_equal = static_cast<int64_t>(s.progress->k);
  const uint32_t before = (1u << threadIdx.x % 32) - 1;
  for_chunks_of_warp(s, [&](int64_t chunk) {
    int64_t equal = s.equal[chunk];
    int64_t at = output_begin(s.above[chunk], equal, n_equal);
    for_candidates(s, chunk, [&](bool inside, Key bits, int64_t position) {
      const Key rank = rank_of(bits, s.infinity);
      const uint32_t equals = __ballot_sync(~0u, inside && rank == threshold);
      const bool kept =
          inside && is_kept(rank, threshold, equal + __popc(equals & before), n_equal);
      const uint32_t mask = __ballot_sync(~0u, kept);
      if (kept) {
        const int64_t linear = s.linear == nullptr ? position : s.linear[position];
        const int64_t e = at + __popc(mask & before), i = s.row_of(linear);
        indices[e] = i;
        indices[s.k + e] = linear - i * s.c.cols;
        values[e] = bits;
      }
      at += __popc(mask);
      equal += __popc(equals);
    });
  });
}

// What the launches share; its memory is freed, in stream order, with the tensors.
template <class Key>
struct Scratch {
  Tensor zeros, sizes, bits, offsets;

  Scratch(const Tensor& like, const Selection<Key>& s)
      : zeros(zeros_on(like, kProgress + kDigits<Key> * kBins, ScalarType::Long)),
        sizes(empty_on(like, 4 * s.n_chunks, ScalarType::Long)),
        bits(empty_on(like, s.capacity * int64_t{sizeof(Key)}, ScalarType::Byte)),
        offsets(empty_on(like, s.capacity, ScalarType::Int)) {}

  void lend(Selection<Key>& s) const {
    int64_t* zero = static_cast<int64_t*>(zeros.mutable_data_ptr());
    s.progress = reinterpret_cast<Progress*>(zero);
    s.counts = reinterpret_cast<Count*>(zero + kProgress);
    s.places = static_cast<int64_t*>(sizes.mutable_data_ptr());
    s.n_stored = s.places + s.n_chunks;
    s.above = s.n_stored + s.n_chunks;
    s.equal = s.above + s.n_chunks;
    s.stored_bits = static_cast<Key*>(bits.mutable_data_ptr());
    s.stored_offsets = static_cast<uint32_t*>(offsets.mutable_data_ptr());
  }

  static constexpr int64_t kProgress = sizeof(Progress) / sizeof(int64_t);
};

template <class Key>
void select(
    const Tensor& c, int64_t k, Key infinity, const Shortlist& shortlist, const Tensor& indices,
    const Tensor& values) {
  Selection<Key> s{};
  s.c = matrix<Key>(c);
  s.contiguous = s.c.contiguous();
  s.infinity = infinity;
  s.n = s.c.rows * s.c.cols;
  s.k = k;
  s.chunk_size = kMinChunk * num_blocks(s.n, kMinChunk * kMaxChunks);
  s.n_chunks = num_blocks(s.n, s.chunk_size);
  s.capacity = std::min(s.n, 2 * k + kCandidateSlack);
  s.shortlist = shortlist;
  // Small, for many warps to have one: in no more chunks than the matrix.
  s.shortlist_chunk_size = 32 * num_blocks(shortlist.capacity, 32 * s.n_chunks);
  const Scratch<Key> scratch(c, s);
  scratch.lend(s);

  const int64_t blocks =
      std::min<int64_t>(num_blocks(s.n_chunks, kTopkWarps), 4 * multiprocessors(c));
  const cudaStream_t stream = current_stream(c);
  count_first<Key><<<blocks, kTopkThreads, 0, stream>>>(s);
  check_launch();
  collect<Key><<<blocks, kTopkThreads, 0, stream>>>(s);
  check_launch();
  for (int d = 2; d < kDigits<Key>; ++d) {
    count_next<Key><<<blocks, kTopkThreads, 0, stream>>>(s, d);
    check_launch();
  }
  count_kept<Key><<<blocks, kTopkThreads, 0, stream>>>(s);
  check_launch();
  write<Key><<<blocks, kTopkThreads, 0, stream>>>(
      s, static_cast<int64_t*>(indices.mutable_data_ptr()),
      static_cast<Key*>(values.mutable_data_ptr()));
  check_launch();
}

std::tuple<Tensor, Tensor> topk_coo(const Tensor& c, int64_t k) {
  check_matrix("c", c);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  return topk_with_shortlist(c, k, Shortlist{});
}

}  // namespace

std::tuple<Tensor, Tensor> topk_with_shortlist(
    const Tensor& c, int64_t k, const Shortlist& shortlist) {
  const DeviceGuard guard(c.get_device_index());
  k = std::min(k, c.size(0) * c.size(1));
  const Tensor indices = torch::stable::new_empty(c, {2, k}, ScalarType::Long);
  const Tensor values = empty_on(c, k, c.scalar_type());
  if (k > 0) {
    dispatch_bits(c.scalar_type(), [&](auto key, auto infinity) {
      select<typename decltype(key)::type>(c, k, infinity, shortlist, indices, values);
    });
  }
  return {indices, values};
}

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("topk_coo", TORCH_BOX(&topk_coo));
}

}  // namespace sparsegrad
