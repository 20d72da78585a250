// delta basis where delta's columns run along memory: a block for each strip of its rows, so that
// what it reads of a column, and adds to one of W, is whole sectors of memory.
#pragma once

#include "delta_times.cuh"

namespace sparsegrad {
namespace {

constexpr int kStrip = 8;        // rows; their elements of a column are 16 bytes at least
constexpr int kNarrowStrip = 2;  // where there would be too few blocks

// Sizes, and what a block holds: the entries of each row, as many as fit, and a slice of the sums.
template <class T, int kRows>
struct Strip {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kAlong = std::min(kRows, kVector);  // elements of a column read at once
  static constexpr int kRoom = 2048 / kRows;               // entries of a row
  static constexpr int kSlice = 16384 / sizeof(wide_t<T>) / kRows;
  static constexpr int kPitch = kSlice + kVector;  // no bank twice when read across
  static_assert(kRoom >= kDeltaThreads, "a step must fit");

  int32_t inner[kRows][kRoom];
  wide_t<T> value[kRows][kRoom];
  alignas(32) wide_t<T> sums[kRows][kPitch];
  int32_t counts[kDeltaThreads / 32][kRows];
  int32_t length[kRows];
};

// The elements of a column of a strip.
template <class T, int kRows>
struct Slab {
  static constexpr int kAlong = Strip<T, kRows>::kAlong;
  Pack<T, kAlong> part[kRows / kAlong];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kRows / kAlong; ++i) {
      part[i] = reinterpret_cast<const Pack<T, kAlong>*>(from)[i];
    }
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kRows / kAlong; ++i) {
      reinterpret_cast<Pack<T, kAlong>*>(to)[i] = part[i];
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      part[r / kAlong].at[r % kAlong] = static_cast<T>(0.0f);
    }
  }
  __device__ T at(int r) const {
    return part[r / kAlong].at[r % kAlong];
  }
};

// Compacts the strip's rows from column `next` on, a column a thread, and moves that to where the
// room of one was full. By a whole block, between barriers.
template <class T, int kRows>
__device__ __forceinline__ void gather_strip(
    const Matrix<T>& delta, int64_t first, int64_t& next, Strip<T, kRows>& strip) {
  constexpr int kAhead = sizeof(T) == 8 ? 1 : 2;  // steps whose loads are in flight together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool counting = threadIdx.x < kRows;  // a thread for each row
  int32_t length = 0;
  bool full = false;
  while (next < delta.cols && !full) {
    Slab<T, kRows> ahead[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int64_t col = next + s * kDeltaThreads + threadIdx.x;
      if (col < delta.cols) {
        ahead[s].load(&delta(first, col));
      } else {
        ahead[s].clear();
      }
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (next >= delta.cols || full) {
        break;
      }
      int32_t before[kRows], in_warp = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t lanes = __ballot_sync(~0u, is_entry(ahead[s].at(r)));
        before[r] = __popc(lanes & lanes_below());
        in_warp = lane == r ? __popc(lanes) : in_warp;
      }
      __syncthreads();  // the last counts have been read
      if (lane < kRows) {
        strip.counts[warp][lane] = in_warp;
      }
      __syncthreads();
      int32_t end = length;
      if (counting) {
#pragma unroll
        for (int w = 0; w < kDeltaThreads / 32; ++w) {
          const int32_t count = strip.counts[w][threadIdx.x];
          strip.counts[w][threadIdx.x] = end;
          end += count;
        }
      }
      full = __syncthreads_or(end > Strip<T, kRows>::kRoom);
      if (full) {
        break;
      }
      length = end;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (is_entry(ahead[s].at(r))) {
          const int32_t at = strip.counts[warp][r] + before[r];
          strip.inner[r][at] = static_cast<int32_t>(next + threadIdx.x);
          strip.value[r][at] = static_cast<wide_t<T>>(ahead[s].at(r));
        }
      }
      next += kDeltaThreads;
    }
  }
  if (counting) {
    strip.length[threadIdx.x] = length;
  }
}

// Adds a slice of the sums to W; rows without entries stay to the bit.
template <class T, int kRows, class Round>
__device__ __forceinline__ void add_slice(
    const AddTo<T, Round>& to, int64_t first, int64_t base, int32_t size, uint32_t held,
    const Strip<T, kRows>& strip) {
  constexpr int kAlong = Strip<T, kRows>::kAlong, kParts = kRows / kAlong;
#pragma unroll 2
  for (int32_t i = threadIdx.x; i < size * kParts; i += kDeltaThreads) {
    const int row = i % kParts * kAlong, at = i / kParts;
    auto* const place =
        reinterpret_cast<Pack<T, kAlong>*>(&to.weight(first + row, base + at));
    Pack<T, kAlong> elements = *place;
#pragma unroll
    for (int j = 0; j < kAlong; ++j) {
      if (held >> (row + j) & 1) {
        elements.at[j] =
            to.add(elements.at[j], strip.sums[row + j][at], first + row + j, base + at);
      }
    }
    *place = elements;
  }
}

template <class T, int kRows, class To>
__global__ void __launch_bounds__(kDeltaThreads, sizeof(T) == 4 ? 3 : 2)
    delta_strips(Matrix<T> delta, Matrix<const T> basis, To to) {
  using Wide = wide_t<T>;
  using S = Strip<T, kRows>;
  constexpr int kVector = S::kVector;
  __shared__ S strip;
  const int64_t first = int64_t{blockIdx.x} * kRows;

  int64_t next = 0;
  bool all = false;   // whether all entries fit, so that they need not be gathered again
  uint32_t held = 0;  // a bit for each row with entries
  for (int64_t base = 0; base < basis.cols; base += S::kSlice) {
    const int32_t size = static_cast<int32_t>(min(basis.cols - base, int64_t{S::kSlice}));
    const int32_t vectors = size / kVector;
    next = all ? next : 0;
    bool begun = false;
    do {
      if (!all) {
        __syncthreads();
        gather_strip<T, kRows>(delta, first, next, strip);
        all = !begun && next >= delta.cols;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          held |= static_cast<uint32_t>(strip.length[r] > 0) << r;
        }
        if (To::kAdds && all && held == 0) {
          return;
        }
      }
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < kRows * vectors; i += kDeltaThreads) {
        const int row = i / vectors, col = i % vectors * kVector;
        Wide sum[kVector] = {};
        add_entries<kVector, sizeof(T) == 4 ? 6 : 4, T>(
            strip.inner[row], strip.value[row], strip.length[row], basis, base + col, sum);
        auto* const place = reinterpret_cast<Pack<Wide, kVector>*>(&strip.sums[row][col]);
        if (begun) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            sum[j] += place->at[j];
          }
        }
        if (!To::kAdds && next >= delta.cols) {
          if constexpr (!To::kAdds) {
            to.store(first + row, base + col, sum);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            place->at[j] = sum[j];
          }
        }
      }
      begun = true;
    } while (next < delta.cols);
    if constexpr (To::kAdds) {
      __syncthreads();
      add_slice(to, first, base, size, held, strip);
      __syncthreads();
    }
  }

  // All of delta has been read: the last to be gathered lies before a barrier.
  if (all) {
    for (int r = threadIdx.x / 32; r < kRows; r += kDeltaThreads / 32) {
      for (int32_t e = threadIdx.x % 32; e < strip.length[r]; e += 32) {
        delta(first + r, strip.inner[r][e]) = static_cast<T>(0.0f);
      }
    }
    return;
  }
  Slab<T, kRows> zeros;
  zeros.clear();
  for (int64_t col = threadIdx.x; col < delta.cols; col += kDeltaThreads) {
    zeros.store(&delta(first, col));
  }
}

template <int kRows, class T, class To>
void launch_delta_strips(
    const Matrix<T>& delta, const Matrix<const T>& basis, const To& to, cudaStream_t stream) {
  delta_strips<T, kRows, To><<<delta.rows / kRows, kDeltaThreads, 0, stream>>>(delta, basis, to);
  check_launch();
}

}  // namespace
}  // namespace sparsegrad
