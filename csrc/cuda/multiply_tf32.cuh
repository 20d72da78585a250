// Products of float32 with the tensor cores: the operands are rounded to tf32 on their way from
// shared memory, and the sums are float32.
//
// Lane l of a warp holds of an 8 x 4 tile of an operand (outer x depth) the element [l / 4, l % 4].
// Where the depth is contiguous that is what ldmatrix gives, to which an element is two of 16 bits;
// its 8 rows of 16 bytes, 80 bytes apart, meet all banks. Where the outer axis is contiguous,
// elements are read one by one: rows are padded by 8 of them, so that the depth l % 4 starts at
// bank 8 (l % 4), and the lanes meet the banks 8 (l % 4) + l / 4: all.
#pragma once

#include "multiply.cuh"

namespace sparsegrad {

template <bool kAOuterContiguous, bool kBOuterContiguous>
struct TensorCoreTf32 : WarpTiles {
  using Element = float;
  static constexpr int kK = 16, kMasked = 2;
  using LayoutA = TileLayout<float, kM, kK, kAOuterContiguous, kAOuterContiguous ? 8 : 4>;
  using LayoutB = TileLayout<float, kN, kK, kBOuterContiguous, kBOuterContiguous ? 8 : 4>;

  // Four 8 x 4 tiles: the i-th at outer + 8 where bit i of kOuterBits is set, and at depth + 4 where
  // that of kDepthBits is.
  template <class Layout, int kOuterBits, int kDepthBits>
  static __device__ __forceinline__ void load(
      uint32_t (&to)[4], const float* tile, int outer, int depth) {
    const int lane = threadIdx.x % 32;
    if constexpr (Layout::kOuterContiguous) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = outer + (kOuterBits >> i & 1) * 8 + lane / 4;
        const int d = depth + (kDepthBits >> i & 1) * 4 + lane % 4;
        to[i] = round_tf32(tile[Layout::at(o, d)]);
      }
    } else {
      const int o = outer + (kOuterBits >> lane / 8 & 1) * 8 + lane % 8;
      const int d = depth + (kDepthBits >> lane / 8 & 1) * 4;
      load_matrices<false>(to, tile + Layout::at(o, d));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i] = round_tf32(__uint_as_float(to[i]));
      }
    }
  }

  static __device__ __forceinline__ void multiply(
      const float* a, const float* b, Accumulator& acc) {
#pragma unroll
    for (int k = 0; k < kK; k += 8) {
      uint32_t right[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // at [k, n], [k + 4, n], [k, n + 8], [k + 4, n + 8]
        load<LayoutB, 0b1100, 0b1010>(right[j], b, warp_n() + j * 16, k);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t left[4];  // at [m, k], [m + 8, k], [m, k + 4], [m + 8, k + 4]
        load<LayoutA, 0b1010, 0b1100>(left, a, warp_m() + i * 16, k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          tensor_core_tf32(
              acc.at[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

}  // namespace sparsegrad
