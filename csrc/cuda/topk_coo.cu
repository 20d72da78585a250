// The k entries of largest magnitude, exact: of equal ones the lowest linear index, NaN on top.
//
// Radix selection, the matrix being read twice. 1: a histogram of the highest digit, which gives
// that of the k-th largest. 2: entries of this digit or above are stored; of those that have it,
// the next digit is counted. The digits that are left, the counts of what each chunk keeps, and the
// output need only what is stored. Where what is read fits the L2 cache one launch does all of it;
// elsewhere each phase is a launch.
//
// Near a threshold, the last call's, one read of the matrix stores what reaches it. Where that holds
// the k largest, and only the device knows, the first phases have nothing left to do.
//
// SASS: LDG\.E\.128, VOTE, REDUX, ATOMS\.POPC\.INC, ATOMS\.ADD
#include "cooperative.cuh"
#include "last_block.cuh"
#include "topk_phases.cuh"

namespace sparsegrad {
namespace {

// Phases first to last; of several the blocks must be resident together, to wait for each other.
// `stored`: the candidates already are.
template <class Key>
__device__ void go_through(
    const Selection<Key>& s, int first, int last, bool stored, Room& room, int64_t* indices,
    Key* values) {
#pragma unroll 1
  for (int phase = first; phase <= last; ++phase) {
    run_phase(s, phase, stored, room, indices, values);
    if (phase == kWrite<Key>) {
      return;
    }
    if (is_last_block(s.progress->finished + phase)) {
      prepare_next(s, phase, room);
      if (phase < last) {
        open_gate(s.progress->opened + phase);
      }
    } else if (phase < last) {
      wait_at_gate(s.progress->opened + phase);
    }
  }
}

template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) run_phases(
    Selection<Key> s, int first, int last, int64_t* indices, Key* values) {
  __shared__ Room room;
  prefer_shortlist(s);
  go_through(s, first, last, false, room, indices, values);
}

// All phases, in one launch, from a threshold.
template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) run_near(
    Selection<Key> s, int64_t* indices, Key* values) {
  constexpr int kStep = kMaxSteps - 1;
  static_assert(kWrite<Key> <= kStep);
  __shared__ Room room;
  const Key lowest = lowest_rank(s);
  bool is_near = lowest != 0;
  if (is_near) {
    count_in_block(room.counts, s.counts + kDigits<Key> * kBins, [&](unsigned int* own) {
      collect_near(s, lowest, own);
    });
    if (is_last_block(s.progress->finished + kStep)) {
      judge_near(s, lowest, room);
      open_gate(s.progress->opened + kStep);
    } else {
      wait_at_gate(s.progress->opened + kStep);
    }
    is_near = *const_cast<volatile int32_t*>(&s.progress->is_near) != 0;
  }
  const int first = is_near ? kOneHistogram<Key> ? kCountKept<Key> : 1 : 0;
  go_through(s, first, kWrite<Key>, is_near, room, indices, values);
}

// What the launches share; its memory is freed, in stream order, with the tensors.
template <class Key>
struct Scratch {
  Tensor zeros, sizes, bits, offsets;

  Scratch(const Tensor& like, const Selection<Key>& s)
      : zeros(zeros_on(like, kProgress + (kDigits<Key> + 1) * kBins, ScalarType::Long)),
        sizes(empty_on(like, int64_t{4} * s.n_chunks, ScalarType::Long)),
        bits(empty_on(like, s.capacity * int64_t{sizeof(Key)}, ScalarType::Byte)),
        offsets(empty_on(like, s.capacity, ScalarType::Int)) {}

  int64_t bytes() const {
    return 8 * (zeros.numel() + sizes.numel()) + bits.numel() + 4 * offsets.numel();
  }

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

// What one launch of all phases can do on a device.
struct Limits {
  int device = -1;
  int64_t blocks = 0, bytes = 0;
};

template <class Key>
const Limits& single_launch_limits(int device) {
  static thread_local Limits known;
  if (known.device != device) {
    // Half the cache: there is more to be kept than what is selected from.
    known = {
        device,
        std::min(
            resident_blocks(run_phases<Key>, kTopkThreads, device),
            resident_blocks(run_near<Key>, kTopkThreads, device)),
        device_attribute(cudaDevAttrL2CacheSize, device) / 2};
  }
  return known;
}

template <class Key>
void select(
    const Tensor& c, int64_t k, Key infinity, const Shortlist& shortlist, float* threshold,
    const Tensor& indices, const Tensor& values) {
  Selection<Key> s{};
  s.c = matrix<Key>(c);
  s.packed = s.c.contiguous() && is_aligned_to_pack(s.c.data);
  s.infinity = infinity;
  s.n = s.c.rows * s.c.cols;
  s.k = k;
  s.chunk_size = kMinChunk * num_blocks(s.n, kMinChunk * kMaxChunks);
  s.n_chunks = static_cast<int>(num_blocks(s.n, s.chunk_size));
  s.capacity = std::min(s.n, (threshold == nullptr ? 2 : kPerEntryNear) * k + kCandidateSlack);
  s.shortlist = shortlist;
  // Small, for many warps to have one: in no more chunks than the matrix.
  s.shortlist_chunk_size = 32 * num_blocks(shortlist.capacity, int64_t{32} * s.n_chunks);
  s.threshold = threshold;
  const Scratch<Key> scratch(c, s);
  scratch.lend(s);

  int64_t* const to_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  Key* const to_values = static_cast<Key*>(values.mutable_data_ptr());
  const int64_t wanted_blocks = num_blocks(s.n_chunks, kTopkWarps);
  const cudaStream_t stream = current_stream(c);
  const Limits& limits = single_launch_limits<Key>(c.get_device_index());
  const int64_t together = std::min(wanted_blocks, limits.blocks);
  // Where there is a shortlist the matrix is hardly ever read.
  const int64_t read = shortlist.state == nullptr
                           ? s.n * int64_t{sizeof(Key)}
                           : shortlist.capacity * int64_t{sizeof(Key) + sizeof(int64_t)};
  if (together > 0 && read + scratch.bytes() <= limits.bytes) {
    const bool near = threshold != nullptr && shortlist.state == nullptr && s.packed &&
                      s.chunk_size == kMinChunk;
    const bool launched =
        near ? launch_together(
                   run_near<Key>, together, kTopkThreads, stream, s, to_indices, to_values)
             : launch_together(
                   run_phases<Key>, together, kTopkThreads, stream, s, 0, kWrite<Key>, to_indices,
                   to_values);
    if (launched) {
      return;
    }
  }
  const int64_t blocks = std::min<int64_t>(wanted_blocks, 4 * multiprocessors(c));
  for (int phase = 0; phase <= kWrite<Key>; ++phase) {
    run_phases<Key><<<blocks, kTopkThreads, 0, stream>>>(s, phase, phase, to_indices, to_values);
    check_launch();
  }
}

std::tuple<Tensor, Tensor> topk_coo(const Tensor& c, int64_t k) {
  check_matrix("c", c);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  return topk_with_shortlist(c, k, Shortlist{}, nullptr);
}

std::tuple<Tensor, Tensor> topk_coo_near(const Tensor& c, int64_t k, const Tensor& threshold) {
  check_matrix("c", c);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  check_dtype("threshold", threshold, ScalarType::Float);
  check_size("threshold", threshold.numel(), 1);
  check_device("threshold", threshold, c);
  mark_written("threshold", threshold);
  return topk_with_shortlist(
      c, k, Shortlist{}, static_cast<float*>(threshold.mutable_data_ptr()));
}

}  // namespace

bool is_selected_at_once(const Tensor& like, int64_t n, int64_t k) {
  const int device = static_cast<int>(like.get_device_index());
  const int64_t each = like.element_size() + sizeof(uint32_t);
  const int64_t bytes = n * like.element_size() + (kPerEntryNear * k + kCandidateSlack) * each;
  return bytes < device_attribute(cudaDevAttrL2CacheSize, device) / 4;
}

std::tuple<Tensor, Tensor> topk_with_shortlist(
    const Tensor& c, int64_t k, const Shortlist& shortlist, float* threshold) {
  const DeviceGuard guard(c.get_device_index());
  k = std::min(k, c.size(0) * c.size(1));
  const Tensor indices = empty_on(c, 2, k, ScalarType::Long);
  const Tensor values = empty_on(c, k, c.scalar_type());
  if (k > 0) {
    dispatch_bits(c.scalar_type(), [&](auto key, auto infinity) {
      select<typename decltype(key)::type>(
          c, k, infinity, shortlist, threshold, indices, values);
    });
  }
  return {indices, values};
}

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("topk_coo", TORCH_BOX(&topk_coo));
  m.impl("_topk_coo_near", TORCH_BOX(&topk_coo_near));
}

}  // namespace sparsegrad
