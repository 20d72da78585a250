// The k entries of largest magnitude, exact: of equal ones the lowest linear index, NaN on top.
//
// Radix selection, the matrix being read twice. 1: a histogram of the highest digit, which gives that
// of the k-th largest. 2: entries of this digit or above are stored; of those that have it, the next
// digit is counted. The digits that are left, the counts of what each chunk keeps, and the output
// need only what is stored. What is read fits the L2 cache, or it does not: one launch does it all,
// or each phase is a launch.
//
// SASS: LDG\.E\.128, VOTE, REDUX, ATOMS\.POPC\.INC, ATOMS\.ADD
#include "last_block.cuh"
#include "topk_phases.cuh"

namespace sparsegrad {
namespace {

// Phases first to last; of several the blocks must be resident together, to wait for each other.
template <class Key>
__global__ void __launch_bounds__(kTopkThreads, 2) run_phases(
    Selection<Key> s, int first, int last, int64_t* indices, Key* values) {
  __shared__ Room room;
  prefer_shortlist(s);
#pragma unroll 1
  for (int phase = first; phase <= last; ++phase) {
    run_phase(s, phase, room, indices, values);
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

// What the launches share; its memory is freed, in stream order, with the tensors.
template <class Key>
struct Scratch {
  Tensor zeros, sizes, bits, offsets;

  Scratch(const Tensor& like, const Selection<Key>& s)
      : zeros(zeros_on(like, kProgress + kDigits<Key> * kBins, ScalarType::Long)),
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

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// What one launch of all phases can be on a device.
struct SingleLaunch {
  int device = -1;
  int64_t most_blocks = 0;  // that are resident together; 0: they cannot wait for each other
  int64_t most_bytes = 0;   // that surely stay in the L2 cache

  template <class Key>
  static const SingleLaunch& on(int device) {
    static thread_local SingleLaunch known;
    if (known.device != device) {
      int per_multiprocessor = 0;
      check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_multiprocessor, run_phases<Key>, kTopkThreads, 0));
      known.most_blocks = int64_t{device_attribute(cudaDevAttrCooperativeLaunch, device)} *
                          per_multiprocessor *
                          device_attribute(cudaDevAttrMultiProcessorCount, device);
      known.most_bytes = device_attribute(cudaDevAttrL2CacheSize, device) / 2;
      known.device = device;
    }
    return known;
  }
};

// False, and nothing is launched, where the device is not to be had whole: it is shared.
template <class Key>
bool launch_together(
    const Selection<Key>& s, int64_t blocks, int64_t* indices, Key* values, cudaStream_t stream) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned int>(blocks);
  config.blockDim = kTopkThreads;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, run_phases<Key>, s, 0, kWrite<Key>, indices, values);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // it is not to be found by a later check
    return false;
  }
  check_cuda(error);
  return true;
}

template <class Key>
void select(
    const Tensor& c, int64_t k, Key infinity, const Shortlist& shortlist, const Tensor& indices,
    const Tensor& values) {
  Selection<Key> s{};
  s.c = matrix<Key>(c);
  s.packed = s.c.contiguous() && is_aligned_to_pack(s.c.data);
  s.infinity = infinity;
  s.n = s.c.rows * s.c.cols;
  s.k = k;
  s.chunk_size = kMinChunk * num_blocks(s.n, kMinChunk * kMaxChunks);
  s.n_chunks = static_cast<int>(num_blocks(s.n, s.chunk_size));
  s.capacity = std::min(s.n, 2 * k + kCandidateSlack);
  s.shortlist = shortlist;
  // Small, for many warps to have one: in no more chunks than the matrix.
  s.shortlist_chunk_size = 32 * num_blocks(shortlist.capacity, int64_t{32} * s.n_chunks);
  const Scratch<Key> scratch(c, s);
  scratch.lend(s);

  int64_t* const to_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  Key* const to_values = static_cast<Key*>(values.mutable_data_ptr());
  const int64_t wanted_blocks = num_blocks(s.n_chunks, kTopkWarps);
  const cudaStream_t stream = current_stream(c);
  const SingleLaunch& single = SingleLaunch::on<Key>(c.get_device_index());
  // Where there is a shortlist the matrix is hardly ever read.
  const int64_t read = shortlist.state == nullptr
                           ? s.n * int64_t{sizeof(Key)}
                           : shortlist.capacity * int64_t{sizeof(Key) + sizeof(int64_t)};
  if (single.most_blocks > 0 && read + scratch.bytes() <= single.most_bytes &&
      launch_together(
          s, std::min(wanted_blocks, single.most_blocks), to_indices, to_values, stream)) {
    return;
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
