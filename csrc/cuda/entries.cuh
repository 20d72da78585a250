// The entries of a sparse matrix in the order of its elements, whatever order they are given in.
// The sort is stable: entries given twice stay in the order given.
#pragma once

#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"

namespace sparsegrad {

constexpr int kEntryThreads = 256;

// The order's key is that of an element [outer, inner] in row-major order, where outer is the row
// or, `by_cols`, the column; `positions` are those of the entries given.
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

__global__ void entry_keys(
    Entries entries, bool by_cols, int64_t* __restrict__ keys, int32_t* __restrict__ positions) {
  const int64_t e = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (e < entries.indices.cols) {
    int64_t row, col;
    entries.load(e, row, col);
    keys[e] = by_cols ? col * entries.rows + row : row * entries.cols + col;
    positions[e] = static_cast<int32_t>(e);
  }
}

}  // namespace

// Of fewer than 2^31 entries.
inline SortedEntries sort_entries(
    const Tensor& like, const Entries& entries, bool by_cols, cudaStream_t stream) {
  const int64_t n = entries.indices.cols;
  const Tensor keys = empty_on(like, n, ScalarType::Long);
  const Tensor positions = empty_on(like, n, ScalarType::Int);
  const SortedEntries sorted{
      empty_on(like, n, ScalarType::Long), empty_on(like, n, ScalarType::Int)};
  int64_t* const key = static_cast<int64_t*>(keys.mutable_data_ptr());
  int32_t* const position = static_cast<int32_t*>(positions.mutable_data_ptr());
  entry_keys<<<num_blocks(n, kEntryThreads), kEntryThreads, 0, stream>>>(
      entries, by_cols, key, position);
  check_launch();

  const int bits = std::bit_width(static_cast<uint64_t>(entries.rows * entries.cols));
  const auto sort = [&](void* room, size_t& bytes) {
    check_cuda(cub::DeviceRadixSort::SortPairs(
        room, bytes, key, static_cast<int64_t*>(sorted.keys.mutable_data_ptr()), position,
        static_cast<int32_t*>(sorted.positions.mutable_data_ptr()), static_cast<int>(n), 0, bits,
        stream));
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  const Tensor room = empty_on(like, static_cast<int64_t>(bytes), ScalarType::Byte);
  sort(room.mutable_data_ptr(), bytes);
  return sorted;
}

}  // namespace sparsegrad
