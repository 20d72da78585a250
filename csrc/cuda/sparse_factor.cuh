// A sparse matrix times a basis: the factor of fold_ that its entries shrink.
#pragma once

#include "entries.cuh"

namespace sparsegrad {
namespace {

constexpr int kScanThreads = 1024;

// The entries of D by groups of equal outer index: group g has outer index kept[parts * g] and
// entries [begins[g], begins[g + 1]). A group has `parts` rows of the factor, and so as many equal
// elements of `kept`; `count` is that of rows.
struct Groups {
  int32_t *kept, *begins, *count;
  int parts;
};

__device__ int32_t lower_bound(const int64_t* keys, int32_t n, int64_t key) {
  int32_t low = 0, high = n;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block. `outer_size`, `inner_size`: the shape of D in the order of its keys.
__global__ void __launch_bounds__(kScanThreads) find_groups(
    const int64_t* __restrict__ keys, int32_t n, int64_t outer_size, int64_t inner_size,
    Groups groups) {
  using Scan = cub::BlockScan<int32_t, kScanThreads>;
  __shared__ typename Scan::TempStorage room;
  int32_t count = 0;
  for (int64_t base = 0; base < outer_size; base += kScanThreads) {
    const int64_t outer = base + threadIdx.x;
    const int32_t begin = lower_bound(keys, n, outer * inner_size);
    const bool holds = outer < outer_size && begin < n && keys[begin] < (outer + 1) * inner_size;
    int32_t before, found;
    Scan(room).ExclusiveSum(static_cast<int32_t>(holds), before, found);
    __syncthreads();
    if (holds) {
      for (int part = 0; part < groups.parts; ++part) {
        groups.kept[(count + before) * groups.parts + part] = static_cast<int32_t>(outer);
      }
      groups.begins[count + before] = begin;
    }
    count += found;
  }
  if (threadIdx.x == 0) {
    groups.begins[count] = n;
    *groups.count = count * groups.parts;
  }
}

constexpr int kFactorThreads = 128;

// out[g, j] = sum over the entries of group g of value * basis[inner, j]; kVector columns a thread.
// In two parts, out[2 g] is the sum in T and out[2 g + 1] what that lacks.
template <class T, int kVector>
__global__ void __launch_bounds__(kFactorThreads) sparse_times(
    Groups groups, const int64_t* __restrict__ keys, const int32_t* __restrict__ positions,
    const T* __restrict__ values, int64_t value_stride, int64_t inner_size, Matrix<const T> basis,
    T* __restrict__ out, int64_t out_stride) {
  using Wide = wide_t<T>;
  struct alignas(kVector * sizeof(T)) Vector {
    T at[kVector];
  };
  __shared__ int32_t inner[kFactorThreads];
  __shared__ Wide value[kFactorThreads];
  const int32_t group = blockIdx.x;
  if (group * groups.parts >= *groups.count) {
    return;
  }
  const int64_t col = (int64_t{blockIdx.y} * kFactorThreads + threadIdx.x) * kVector;
  const int64_t first_key = groups.kept[group * groups.parts] * inner_size;
  const int32_t end = groups.begins[group + 1];
  Wide sum[kVector] = {};
  for (int32_t begin = groups.begins[group]; begin < end; begin += kFactorThreads) {
    const int32_t together = min(end - begin, kFactorThreads);
    __syncthreads();
    if (threadIdx.x < together) {
      const int32_t e = begin + threadIdx.x;
      inner[threadIdx.x] = static_cast<int32_t>(keys[e] - first_key);
      value[threadIdx.x] = static_cast<Wide>(values[positions[e] * value_stride]);
    }
    __syncthreads();
    if (col < basis.cols) {
#pragma unroll 4
      for (int i = 0; i < together; ++i) {
        const T* from = basis.data + inner[i] * basis.row_stride + col * basis.col_stride;
        const Vector row = *reinterpret_cast<const Vector*>(from);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          sum[j] += value[i] * static_cast<Wide>(row.at[j]);
        }
      }
    }
  }
  if (col < basis.cols) {
    for (int part = 0; part < groups.parts; ++part) {
      Vector rounded;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        rounded.at[j] = static_cast<T>(sum[j]);
        const Wide left = sum[j] - static_cast<Wide>(rounded.at[j]);
        sum[j] = left - left == 0 ? left : 0;  // nothing is left of what T cannot hold
      }
      const int64_t row = int64_t{group} * groups.parts + part;
      *reinterpret_cast<Vector*>(out + row * out_stride + col) = rounded;
    }
  }
}

template <class T>
void launch_sparse_times(
    const Groups& groups, int64_t max_groups, const SortedEntries& entries, const T* values,
    int64_t value_stride, Matrix<const T> basis, const Tensor& out, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors = basis.col_stride == 1 && basis.row_stride % kVector == 0 &&
                       basis.cols % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(basis.data) % 16 == 0;
  const int64_t width = kFactorThreads * (vectors ? kVector : 1);
  const dim3 grid(max_groups, num_blocks(basis.cols, width));
  const auto kernel = vectors ? sparse_times<T, kVector> : sparse_times<T, 1>;
  kernel<<<grid, kFactorThreads, 0, stream>>>(
      groups, entries.key(), entries.position(), values, value_stride, basis.rows, basis,
      static_cast<T*>(out.mutable_data_ptr()), out.stride(0));
  check_launch();
}

}  // namespace
}  // namespace sparsegrad
