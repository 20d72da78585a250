// The entries of a sparse matrix D in the order of its elements, whatever the order and the
// repetitions they are given in. The sort is stable: repeated entries stay in the order given.
#pragma once

#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"

namespace sparsegrad {

constexpr int kEntryThreads = 256;

// D [2 axes], of which `outer` is the one whose indices come first in the order.
struct EntryIndices {
  const int64_t* data;  // [2, n]
  int64_t axis_stride, stride;
  int32_t n;
  int outer;
  int64_t outer_size, inner_size;
};

// The order's key is outer * inner_size + inner; `positions` are those of the entries given.
struct SortedEntries {
  Tensor keys, positions;
  const int64_t* key() const {
    return static_cast<const int64_t*>(keys.const_data_ptr());
  }
  const int32_t* position() const {
    return static_cast<const int32_t*>(positions.const_data_ptr());
  }
};

namespace {

__global__ void entry_keys(EntryIndices d, int64_t* __restrict__ keys, int32_t* __restrict__ positions) {
  const int64_t e = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (e >= d.n) {
    return;
  }
  const int64_t outer = d.data[d.outer * d.axis_stride + e * d.stride];
  const int64_t inner = d.data[(1 - d.outer) * d.axis_stride + e * d.stride];
  if (outer < 0 || outer >= d.outer_size || inner < 0 || inner >= d.inner_size) {
    __trap();  // as torch's device-side assertion: indices out of bounds
  }
  keys[e] = outer * d.inner_size + inner;
  positions[e] = e;
}

}  // namespace

inline SortedEntries sort_entries(const Tensor& like, const EntryIndices& d, cudaStream_t stream) {
  const auto make = [&](ScalarType dtype) { return torch::stable::new_empty(like, {d.n}, dtype); };
  const Tensor keys = make(ScalarType::Long), positions = make(ScalarType::Int);
  const SortedEntries sorted{make(ScalarType::Long), make(ScalarType::Int)};
  int64_t* const key = static_cast<int64_t*>(keys.mutable_data_ptr());
  int32_t* const position = static_cast<int32_t*>(positions.mutable_data_ptr());
  entry_keys<<<(d.n + kEntryThreads - 1) / kEntryThreads, kEntryThreads, 0, stream>>>(
      d, key, position);
  check_launch();

  const int bits = std::bit_width(static_cast<uint64_t>(d.outer_size * d.inner_size));
  const auto sort = [&](void* room, size_t& bytes) {
    check_cuda(cub::DeviceRadixSort::SortPairs(
        room, bytes, key, static_cast<int64_t*>(sorted.keys.mutable_data_ptr()), position,
        static_cast<int32_t*>(sorted.positions.mutable_data_ptr()), d.n, 0, bits, stream));
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  const Tensor room = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  sort(room.mutable_data_ptr(), bytes);
  return sorted;
}

}  // namespace sparsegrad
