// Adjacent elements that a lane loads at once: 16 bytes, if not told otherwise.
#pragma once

#include "common.cuh"

namespace sparsegrad {

template <class Key, int n = 16 / sizeof(Key)>
struct alignas(n * sizeof(Key)) Pack {
  static constexpr int size = n;
  Key at[n];
};

template <class Key>
bool is_aligned_to_pack(const Key* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Pack<Key>) == 0;
}

}  // namespace sparsegrad
