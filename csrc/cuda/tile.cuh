// Operands of a product, and how a block copies a tile of one into shared memory, gathering as it
// goes. An operand is X [outer, depth]: for A the outer axis is the product's rows, for B its
// columns; depth is the axis that is summed over.
#pragma once

#include "mma.cuh"

namespace sparsegrad {

template <class T>
struct Operand {
  const T* data;
  int64_t outer_stride, depth_stride;
  int32_t outer_size;
  bool gather_depth;  // whether its depth axis is addressed through the list of kept depths
  // Whether vectors of 16 bytes may be read along its outer axis, or along its depth.
  bool outer_vectors, depth_vectors;
};

// A tile in shared memory. Rows are padded, by default by 16 bytes: reading a column of vectors
// then meets all banks.
template <
    class T, int kOuter, int kDepth, bool kOuterContiguous_, int kPadding = 16 / sizeof(T)>
struct TileLayout {
  using Element = T;
  static constexpr bool kOuterContiguous = kOuterContiguous_;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kRow = kOuterContiguous ? kOuter : kDepth;  // contiguous elements
  static constexpr int kRows = kOuterContiguous ? kDepth : kOuter;
  static constexpr int kPitch = kRow + kPadding;
  static constexpr int kSize = kRows * kPitch;

  static __device__ __forceinline__ int at(int outer, int depth) {
    return kOuterContiguous ? depth * kPitch + outer : outer * kPitch + depth;
  }
};

// Which elements a tile takes, in shared memory: -1 takes no part, and becomes 0.
struct TileIndices {
  const int32_t* outer;  // [kOuter]
  const int32_t* depth;  // [kDepth] kept depths
  int32_t first_depth;   // the position of depth[0] among the kept ones
  int32_t n_depth;       // how many positions there are
};

// Threads follow the axis that is contiguous in global memory: depth if kAlongDepth.
template <class Layout, int kOuter, int kDepth, int kThreads, int kVector, bool kAlongDepth>
__device__ __forceinline__ void copy_tile(
    typename Layout::Element* tile, const Operand<typename Layout::Element>& x,
    const TileIndices& indices) {
  using T = typename Layout::Element;
  static_assert(kVector == 1 || kAlongDepth != Layout::kOuterContiguous);
  constexpr int kAlong = (kAlongDepth ? kDepth : kOuter) / kVector;
  constexpr int kCopies = kOuter * kDepth / kVector;
  static_assert(kCopies % kThreads == 0);
#pragma unroll 1  // registers are scarce
  for (int i = threadIdx.x; i < kCopies; i += kThreads) {
    const int along = i % kAlong * kVector, across = i / kAlong;
    const int outer = kAlongDepth ? across : along, depth = kAlongDepth ? along : across;
    const int32_t outer_index = indices.outer[outer];
    const int32_t position = indices.first_depth + depth;
    // A vector along the depth is taken whole: the other operand has 0 where a depth is left out.
    const bool by_position = kVector > 1 && kAlongDepth;
    const int32_t listed = by_position ? position : indices.depth[depth];
    const bool taken = outer_index >= 0 && 0 <= listed && position < indices.n_depth;
    const int32_t depth_index = x.gather_depth ? listed : position;
    const int64_t outer_stride = kVector > 1 && !kAlongDepth ? 1 : x.outer_stride;
    const int64_t depth_stride = kVector > 1 && kAlongDepth ? 1 : x.depth_stride;
    const int64_t offset = outer_index * outer_stride + depth_index * depth_stride;
    int valid = taken;
    if constexpr (kVector > 1) {  // as many as there are to the end of the axis
      const int left = kAlongDepth ? indices.n_depth - depth_index : x.outer_size - outer_index;
      valid = taken ? (left < kVector ? left : kVector) : 0;
    }
    copy_async<kVector * sizeof(T)>(
        tile + Layout::at(outer, depth), x.data + (taken ? offset : 0), valid * sizeof(T));
  }
}

// `outer_whole`, `depth_whole`: nothing is left out of that axis, so its indices are consecutive.
template <class Layout, int kOuter, int kDepth, int kThreads>
__device__ __forceinline__ void load_tile(
    typename Layout::Element* tile, const Operand<typename Layout::Element>& x,
    const TileIndices& indices, bool outer_whole, bool depth_whole) {
  constexpr int kVector = Layout::kVector;
  if constexpr (Layout::kOuterContiguous) {
    if (x.outer_vectors && outer_whole) {
      return copy_tile<Layout, kOuter, kDepth, kThreads, kVector, false>(tile, x, indices);
    }
  } else {
    if (x.depth_vectors && (depth_whole || !x.gather_depth)) {
      return copy_tile<Layout, kOuter, kDepth, kThreads, kVector, true>(tile, x, indices);
    }
  }
  if (x.depth_stride == 1) {
    copy_tile<Layout, kOuter, kDepth, kThreads, 1, true>(tile, x, indices);
  } else {
    copy_tile<Layout, kOuter, kDepth, kThreads, 1, false>(tile, x, indices);
  }
}

}  // namespace sparsegrad
