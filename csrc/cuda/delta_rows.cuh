// delta basis with a block for each row of delta, which runs along memory.
#pragma once

#include "delta_times.cuh"

namespace sparsegrad {
namespace {

// A row's entries, as many as fit.
template <class T>
struct RowEntries {
  static constexpr int kRoom = kDeltaThreads * (16 / sizeof(T));
  int32_t inner[kRoom];
  wide_t<T> value[kRoom];
  int32_t counts[2][kDeltaThreads / 32];  // of each warp; of this step and of the last
};

// Compacts the row from column `next` on, and moves that to where the room was full. By a whole
// block, between barriers; returns the number of entries.
template <class T, int kVector>
__device__ __forceinline__ int32_t gather_row(
    const Matrix<T>& delta, int64_t row, int64_t& next, int& parity, RowEntries<T>& entries) {
  constexpr int kAhead = 4;  // steps whose loads are in flight together
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t step = int64_t{blockDim.x} * kVector;
  int32_t n = 0;
  while (next < delta.cols) {
    Pack<T, kVector> ahead[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int64_t col = next + s * step + threadIdx.x * kVector;
      if (col < delta.cols) {
        ahead[s] = *reinterpret_cast<const Pack<T, kVector>*>(&delta(row, col));
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          ahead[s].at[j] = static_cast<T>(0.0f);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (next >= delta.cols) {
        break;
      }
      int32_t before = 0, in_warp = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const uint32_t lanes = __ballot_sync(~0u, is_entry(ahead[s].at[j]));
        before += __popc(lanes & lanes_below());
        in_warp += __popc(lanes);
      }
      if (threadIdx.x % 32 == 0) {
        entries.counts[parity][warp] = in_warp;
      }
      __syncthreads();
      int32_t total = 0;
      for (int w = 0; w < warps; ++w) {
        const int32_t count = entries.counts[parity][w];
        before += w < warp ? count : 0;
        total += count;
      }
      parity ^= 1;
      if (n + total > RowEntries<T>::kRoom) {
        return n;
      }
      int32_t at = n + before;
      const int64_t col = next + threadIdx.x * kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (is_entry(ahead[s].at[j])) {
          entries.inner[at] = static_cast<int32_t>(col + j);
          entries.value[at] = static_cast<wide_t<T>>(ahead[s].at[j]);
          ++at;
        }
      }
      n += total;
      next += step;
    }
  }
  return n;
}

// Blocks on a multiprocessor, for as many loads in flight; sm_100's code needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T>
constexpr int kRowBlocks = sizeof(T) == 2 ? 2 : 3;
#else
template <class T>
constexpr int kRowBlocks = sizeof(T) == 2 ? 3 : 4;
#endif

template <class T, int kVector, class To>
__global__ void __launch_bounds__(kDeltaThreads, kRowBlocks<T>)
    delta_rows(Matrix<T> delta, Matrix<const T> basis, To to) {
  using Vector = Pack<T, kVector>;
  __shared__ RowEntries<T> entries;
  const int64_t row = blockIdx.x, step = int64_t{blockDim.x} * kVector;
  const int64_t first = threadIdx.x * kVector;

  int64_t next = 0;
  int32_t n = 0;
  int parity = 0;
  bool all = false;  // whether all entries fit, so that they need not be gathered again
  for (int64_t base = 0; base < basis.cols; base += step) {
    const int64_t col = base + first;
    const bool inside = col < basis.cols;
    Vector old;
    wide_t<T> sum[kVector] = {};
    next = all ? next : 0;
    bool begun = false;
    do {
      if (!all) {
        __syncthreads();
        n = gather_row<T, kVector>(delta, row, next, parity, entries);
        all = !begun && next >= delta.cols;
        __syncthreads();
      }
      if constexpr (To::kAdds) {
        if (all && n == 0) {
          return;
        }
        if (inside && !begun) {
          old = *reinterpret_cast<const Vector*>(&to.weight(row, col));
        }
      }
      if (inside) {
        add_entries<kVector, 4, T>(entries.inner, entries.value, n, basis, col, sum);
      }
      begun = true;
    } while (next < delta.cols);
    if (!inside) {
      continue;
    }
    if constexpr (To::kAdds) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        old.at[j] = to.add(old.at[j], sum[j], row, col + j);
      }
      *reinterpret_cast<Vector*>(&to.weight(row, col)) = old;
    } else {
      to.store(row, col, sum);
    }
  }

  // All of delta has been read: the last to be gathered lies before a barrier.
  const T zero = static_cast<T>(0.0f);
  if (all) {
    for (int32_t e = threadIdx.x; e < n; e += blockDim.x) {
      delta(row, entries.inner[e]) = zero;
    }
    return;
  }
  Vector zeros;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    zeros.at[j] = zero;
  }
  for (int64_t col = first; col < delta.cols; col += step) {
    *reinterpret_cast<Vector*>(&delta(row, col)) = zeros;
  }
}

template <int kVector, class T, class To>
void launch_delta_rows(
    const Matrix<T>& delta, const Matrix<const T>& basis, const To& to, cudaStream_t stream) {
  const int64_t vectors = num_blocks(std::max(delta.cols, basis.cols), kVector);
  const int threads =
      static_cast<int>(std::clamp<int64_t>(num_blocks(vectors, 32) * 32, 64, kDeltaThreads));
  delta_rows<T, kVector, To><<<delta.rows, threads, 0, stream>>>(delta, basis, to);
  check_launch();
}

}  // namespace
}  // namespace sparsegrad
