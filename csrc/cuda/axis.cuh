// A product as a kernel is given it, and the axes that it gathers along.
#pragma once

#include "tile.cuh"

namespace sparsegrad {

template <class T>
struct Product {
  Operand<T> a, b;
  int32_t depth_size;
  // Kept outer indices of A and kept depths, ascending; null: all.
  const int32_t* rows = nullptr;
  const int32_t* depths = nullptr;
  // Their counts on the device; null: outer_size, depth_size.
  const int32_t* n_rows = nullptr;
  const int32_t* n_depths = nullptr;
  // Where given, and 0 on the device, nothing is done.
  const int32_t* active = nullptr;
  // Whether float32 is multiplied as tf32: see allows_tf32.
  bool tf32 = false;
};

// Whether the ascending list [n] holds the index.
__device__ inline bool is_listed(const int32_t* list, int32_t n, int32_t index) {
  int32_t low = 0, high = n;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (list[middle] < index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < n && list[low] == index;
}

// An axis of which some indices are kept. Where vectors could be read along it but for a few that
// are left out, it is gone through in full, and those are masked: to the tensor cores the products
// are cheap, and single elements are dear to gather, those of 16 bits most.
struct Axis {
  const int32_t* list;
  int32_t size, n_kept;
  bool all, masked;  // at most one of them

  // It is masked where at least 1 / max_masked of it is kept; 0: never.
  __device__ Axis(const int32_t* list, const int32_t* n_kept, int32_t size, int max_masked)
      : list(list), size(size), n_kept(n_kept == nullptr ? size : *n_kept) {
    all = list == nullptr || this->n_kept == size;
    masked = max_masked > 0 && !all && this->n_kept >= size / max_masked;
  }
  // Positions on the axis, and the index at one of them.
  __device__ int32_t n_positions() const {
    return masked ? size : n_kept;
  }
  __device__ int32_t at(int32_t position) const {
    return list == nullptr || masked ? position : list[position];
  }
  __device__ bool is_left_out(int32_t position) const {
    return masked && !is_listed(list, n_kept, position);
  }
};

}  // namespace sparsegrad
