// How a block multiplies one stage of its pipeline: with the tensor cores (bfloat16, float16; in
// multiply_tf32.cuh float32 as tf32) or with fused multiply-adds (float32, float64). All have the
// same members:
//
//   Accumulator acc;  multiply(a, b, acc)  adds A tile [kM, kK] times B tile [kK, kN];
//   for_pairs(acc, f)  calls f(m, n, value, next): the sums at [m, n] and [m, n + 1] of the tile;
//   kWarpgroups  whether it is multiply_sm90.cuh's, with stages of its own;
//   kMasked  an axis of which at least 1 / kMasked is kept may be gone through in full; 0: never.
#pragma once

#include "tile.cuh"

namespace sparsegrad {

// 8 warps, each with 64 x 32 sums as 4 x 4 tiles of 16 x 8, as the tensor cores leave them.
struct WarpTiles {
  using Sum = float;
  static constexpr int kM = 128, kN = 128, kThreads = 256, kSums = 64;
  static constexpr bool kWarpgroups = false;

  struct Accumulator {
    float at[4][4][4] = {};
    __device__ __forceinline__ float& sum(int i) {
      return at[i / 16][i / 4 % 4][i % 4];
    }
  };

  static __device__ __forceinline__ int warp_m() {
    return threadIdx.x / 128 * 64;
  }
  static __device__ __forceinline__ int warp_n() {
    return threadIdx.x / 32 % 4 * 32;
  }

  template <class F>
  static __device__ __forceinline__ void for_pairs(Accumulator& acc, const F& f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float* sum = acc.at[i][j] + half * 2;
          f(warp_m() + i * 16 + half * 8 + lane / 4, warp_n() + j * 8 + lane % 4 * 2, sum[0],
            sum[1]);
        }
      }
    }
  }
};

template <class T, bool kAOuterContiguous, bool kBOuterContiguous>
struct TensorCore : WarpTiles {
  using Element = T;
  static constexpr int kK = 32, kMasked = 4;
  using LayoutA = TileLayout<T, kM, kK, kAOuterContiguous>;
  using LayoutB = TileLayout<T, kN, kK, kBOuterContiguous>;

  static __device__ __forceinline__ void multiply(const T* a, const T* b, Accumulator& acc) {
    const int lane = threadIdx.x % 32, row = lane % 8, second = lane / 8 % 2, third = lane / 16;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      uint32_t right[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // at [k, n], [k + 8, n], [k, n + 8], [k + 8, n + 8]
        const int n = warp_n() + j * 16 + third * 8, depth = k + second * 8;
        const T* from = kBOuterContiguous ? b + LayoutB::at(n, depth + row)
                                          : b + LayoutB::at(n + row, depth);
        load_matrices<kBOuterContiguous>(right[j], from);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t left[4];  // at [m, k], [m + 8, k], [m, k + 8], [m + 8, k + 8]
        const int m = warp_m() + i * 16 + second * 8, depth = k + third * 8;
        const T* from = kAOuterContiguous ? a + LayoutA::at(m, depth + row)
                                          : a + LayoutA::at(m + row, depth);
        load_matrices<kAOuterContiguous>(left, from);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          tensor_core<T>(acc.at[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

// 16 x 16 threads, each with 2 x 2 groups of 16 bytes by 16 bytes of sums.
template <class T>
struct FusedMultiplyAdd {
  using Element = T;
  using Sum = T;
  static constexpr int kGroup = 16 / sizeof(T), kStep = 16 * kGroup;
  static constexpr int kM = 2 * kStep, kN = 2 * kStep, kK = 16, kThreads = 256, kMasked = 0;
  static constexpr int kSums = 4 * kGroup * kGroup;
  static constexpr bool kWarpgroups = false;
  using LayoutA = TileLayout<T, kM, kK, true>;
  using LayoutB = TileLayout<T, kN, kK, true>;

  struct Accumulator {
    T at[2 * kGroup][2 * kGroup] = {};
    __device__ __forceinline__ T& sum(int i) {
      return at[i / (2 * kGroup)][i % (2 * kGroup)];
    }
  };
  struct alignas(16) Group {
    T at[kGroup];
  };

  static __device__ __forceinline__ void multiply(const T* a, const T* b, Accumulator& acc) {
    const int m = threadIdx.x / 16 * kGroup, n = threadIdx.x % 16 * kGroup;
#pragma unroll 2
    for (int k = 0; k < kK; ++k) {
      Group left[2], right[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[half] = *reinterpret_cast<const Group*>(a + LayoutA::at(m + half * kStep, k));
        right[half] = *reinterpret_cast<const Group*>(b + LayoutB::at(n + half * kStep, k));
      }
#pragma unroll
      for (int i = 0; i < 2 * kGroup; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kGroup; ++j) {
          acc.at[i][j] +=
              left[i / kGroup].at[i % kGroup] * right[j / kGroup].at[j % kGroup];
        }
      }
    }
  }

  template <class F>
  static __device__ __forceinline__ void for_pairs(Accumulator& acc, const F& f) {
    const int m = threadIdx.x / 16 * kGroup, n = threadIdx.x % 16 * kGroup;
#pragma unroll
    for (int i = 0; i < 2 * kGroup; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kGroup; j += 2) {
        f(m + i / kGroup * kStep + i % kGroup, n + j / kGroup * kStep + j % kGroup, acc.at[i][j],
          acc.at[i][j + 1]);
      }
    }
  }
};

}  // namespace sparsegrad
