// A sparse matrix times a basis: the factor of fold_ that its entries shrink, or, with one basis,
// what is added to W.
#pragma once

#include "entries.cuh"
#include "round.cuh"

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

// What the kernels read: `entries` sorted, of a matrix whose inner axis is the basis' rows.
template <class T>
struct SparseTimes {
  Groups groups;
  const int64_t* keys;
  const int32_t* positions;
  const T* values;
  int64_t value_stride;
  Matrix<const T> basis;

  __device__ bool has(int32_t group) const {
    return group * groups.parts < *groups.count;
  }
  __device__ int32_t outer(int32_t group) const {
    return groups.kept[group * groups.parts];
  }

  // sum[j] = sum over the entries of a group of value * basis[inner, col + j]. By a whole block.
  template <int kVector>
  __device__ void sum(int32_t group, int64_t col, wide_t<T> (&sum)[kVector]) const {
    using Wide = wide_t<T>;
    struct alignas(kVector * sizeof(T)) Vector {
      T at[kVector];
    };
    __shared__ int32_t inner[kFactorThreads];
    __shared__ Wide value[kFactorThreads];
    const int64_t first_key = outer(group) * basis.rows;
    const int32_t end = groups.begins[group + 1];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      sum[j] = 0;
    }
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
  }
};

// Stores the sums of a group as a row, or in two parts as two: in T, and what that lacks.
template <class T>
struct StoreParts {
  T* out;
  int64_t stride;  // of whole vectors, as `out` is
  int parts;

  bool takes_vectors(int) const {
    return true;
  }

  template <int kVector>
  __device__ void operator()(
      int32_t group, int32_t, int64_t col, wide_t<T> (&sum)[kVector]) const {
    struct alignas(kVector * sizeof(T)) Vector {
      T at[kVector];
    };
    for (int part = 0; part < parts; ++part) {
      Vector rounded;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        rounded.at[j] = static_cast<T>(sum[j]);
        const wide_t<T> left = sum[j] - static_cast<wide_t<T>>(rounded.at[j]);
        sum[j] = left - left == 0 ? left : 0;  // nothing is left of what T cannot hold
      }
      *reinterpret_cast<Vector*>(out + (int64_t{group} * parts + part) * stride + col) = rounded;
    }
  }
};

// Adds the sums of a group to its row of W.
template <class T, class Round>
struct AddRow {
  Matrix<T> weight;
  Round round;

  bool takes_vectors(int size) const {
    return weight.col_stride == 1 && weight.row_stride % size == 0 &&
           reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
  }

  template <int kVector>
  __device__ void operator()(
      int32_t, int32_t outer, int64_t col, wide_t<T> (&sum)[kVector]) const {
    struct alignas(kVector * sizeof(T)) Vector {
      T at[kVector];
    };
    Vector* const place = reinterpret_cast<Vector*>(&weight(outer, col));
    Vector elements = *place;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const T old = elements.at[j];
      elements.at[j] =
          round(static_cast<wide_t<T>>(old) + sum[j], old, outer * weight.cols + col + j);
    }
    *place = elements;
  }
};

// A block for each group; kVector columns a thread.
template <class T, int kVector, class Finish>
__global__ void __launch_bounds__(kFactorThreads)
    sparse_times(SparseTimes<T> from, Finish finish) {
  const int32_t group = blockIdx.x;
  if (!from.has(group)) {
    return;
  }
  const int64_t col = (int64_t{blockIdx.y} * kFactorThreads + threadIdx.x) * kVector;
  wide_t<T> sum[kVector];
  from.sum(group, col, sum);
  if (col < from.basis.cols) {
    finish(group, from.outer(group), col, sum);
  }
}

constexpr int kColumns = 8;  // of W that a block adds to: their elements of a row are 32 bytes

// W^T += D^T basis: the columns of W that groups stand for.
template <class T, class Round>
__global__ void __launch_bounds__(kFactorThreads)
    add_columns(SparseTimes<T> from, Matrix<T> weight, Round round) {
  __shared__ wide_t<T> sums[kColumns][kFactorThreads + 32 / kColumns];  // no bank twice
  const int32_t first = blockIdx.x * kColumns;
  const int64_t first_row = int64_t{blockIdx.y} * kFactorThreads;
  int32_t n = 0;
  for (; n < kColumns && from.has(first + n); ++n) {
    wide_t<T> sum[1];
    from.sum(first + n, first_row + threadIdx.x, sum);
    sums[n][threadIdx.x] = sum[0];
  }
  __syncthreads();
  const int32_t group = threadIdx.x % kColumns;
  if (group >= n) {
    return;
  }
  const int32_t col = from.outer(first + group);
  for (int32_t i = threadIdx.x / kColumns; i < kFactorThreads; i += kFactorThreads / kColumns) {
    const int64_t row = first_row + i;
    if (row < weight.rows) {
      T& at = weight(row, col);
      const T old = at;
      at = round(static_cast<wide_t<T>>(old) + sums[group][i], old, row * weight.cols + col);
    }
  }
}

template <class T>
SparseTimes<T> sparse_times_of(
    const Groups& groups, const SortedEntries& entries, const T* values, int64_t value_stride,
    const Tensor& basis) {
  return {groups, entries.key(), entries.position(), values, value_stride, matrix<T>(basis)};
}

template <class T, class Finish>
void launch_sparse_times(
    const SparseTimes<T>& from, int64_t max_groups, const Finish& finish, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Matrix<const T>& basis = from.basis;
  const bool vectors = basis.col_stride == 1 && basis.row_stride % kVector == 0 &&
                       basis.cols % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(basis.data) % 16 == 0 &&
                       finish.takes_vectors(kVector);
  const int64_t width = kFactorThreads * (vectors ? kVector : 1);
  const dim3 grid(max_groups, num_blocks(basis.cols, width));
  const auto kernel = vectors ? sparse_times<T, kVector, Finish> : sparse_times<T, 1, Finish>;
  kernel<<<grid, kFactorThreads, 0, stream>>>(from, finish);
  check_launch();
}

template <class T, class Round>
void launch_add_columns(
    const SparseTimes<T>& from, int64_t max_groups, Matrix<T> weight, const Round& round,
    cudaStream_t stream) {
  const dim3 grid(num_blocks(max_groups, kColumns), num_blocks(weight.rows, kFactorThreads));
  add_columns<<<grid, kFactorThreads, 0, stream>>>(from, weight, round);
  check_launch();
}

}  // namespace
}  // namespace sparsegrad
