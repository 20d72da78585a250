// rows = {i : any_j |a_ij| > tol},  cols = {j : any_i |a_ij| > tol}, ascending, padded with -1.
//
// A warp takes 32 rows and as many columns as its lanes hold in 16 bytes each. A vote says whether
// a row has anything; a lane keeps its columns' bits in a register. Both end in bitmasks in memory,
// which the last block turns into positions.
#pragma once

#include "last_block.cuh"
#include "pack.cuh"

#include <cub/block/block_scan.cuh>

namespace sparsegrad {
namespace {

constexpr int kDetectThreads = 256;
constexpr int kTileRows = 32;

template <class Index>
struct Found {
  Index *rows, *cols, *n_rows, *n_cols;

  Found transposed() const {
    return {cols, rows, n_cols, n_rows};
  }
};

// `a` may be the transpose of the caller's: memory is walked along its columns.
template <class Key>
struct Detection {
  Matrix<const Key> a;
  Key limit;
  uint32_t *row_bits, *col_bits;
  unsigned int* finished;
};

// The bits of a lane's columns [j, j + Pack::size) in row i. NaN's bits are above infinity's.
template <bool kVector, class Key>
__device__ uint32_t bits_above(const Detection<Key>& d, int64_t i, int64_t j) {
  constexpr int size = Pack<Key>::size;
  uint32_t bits = 0;
  if (kVector && j + size <= d.a.cols) {
    const Pack<Key> pack = *reinterpret_cast<const Pack<Key>*>(d.a.row(i) + j);
#pragma unroll
    for (int v = 0; v < size; ++v) {
      bits |= static_cast<uint32_t>(magnitude(pack.at[v]) > d.limit) << v;
    }
    return bits;
  }
#pragma unroll
  for (int v = 0; v < size; ++v) {
    if (j + v < d.a.cols) {
      bits |= static_cast<uint32_t>(magnitude(d.a(i, j + v)) > d.limit) << v;
    }
  }
  return bits;
}

// Most bits are set already: an atomic is only paid for one that is new.
inline __device__ void set_bits(uint32_t* word, uint32_t bits) {
  if (bits & ~__ldcg(word)) {
    atomicOr(word, bits);
  }
}

// By one block: the positions of the bits set in [0, n), then -1.
template <class Index>
__device__ void write_positions(const uint32_t* words, int64_t n, Index* out, Index* count) {
  using Scan = cub::BlockScan<int, kDetectThreads>;
  __shared__ typename Scan::TempStorage room;
  const int64_t n_words = num_blocks(n, 32);
  int64_t begin = 0;
  for (int64_t first = 0; first < n_words; first += kDetectThreads) {
    const int64_t w = first + threadIdx.x;
    uint32_t word = w < n_words ? __ldcg(words + w) : 0;
    int before, total;
    Scan(room).ExclusiveSum(__popc(word), before, total);
    Index* at = out + begin + before;
    for (; word != 0; word &= word - 1) {
      *at++ = static_cast<Index>(w * 32 + __ffs(word) - 1);
    }
    begin += total;
    __syncthreads();  // `room` is used again
  }
  for (int64_t e = begin + threadIdx.x; e < n; e += kDetectThreads) {
    out[e] = -1;
  }
  if (threadIdx.x == 0) {
    *count = static_cast<Index>(begin);
  }
}

template <bool kVector, class Key, class Index>
__global__ void __launch_bounds__(kDetectThreads) detect(Detection<Key> d, Found<Index> found) {
  constexpr int size = Pack<Key>::size, kAtOnce = kVector ? 8 : 1;
  const int lane = threadIdx.x % 32;
  const int64_t col_tiles = num_blocks(d.a.cols, 32 * size);
  const int64_t tiles = num_blocks(d.a.rows, kTileRows) * col_tiles;
  const int64_t n_warps = int64_t{gridDim.x} * (kDetectThreads / 32);
  int64_t tile = int64_t{blockIdx.x} * (kDetectThreads / 32) + threadIdx.x / 32;
  for (; tile < tiles; tile += n_warps) {
    const int64_t row_tile = tile / col_tiles;
    const int64_t begin = row_tile * kTileRows, j = (tile % col_tiles * 32 + lane) * size;
    const int n_rows = static_cast<int>(
        d.a.rows - begin < kTileRows ? d.a.rows - begin : int64_t{kTileRows});
    uint32_t rows = 0, cols = 0;
#pragma unroll 1
    for (int first = 0; first < n_rows; first += kAtOnce) {
      uint32_t bits[kAtOnce];  // all are asked for before any is waited for
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        bits[r] = bits_above<kVector>(d, begin + min(first + r, n_rows - 1), j);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const bool inside = first + r < n_rows;
        cols |= bits[r];  // the last row once more is no other
        rows |= static_cast<uint32_t>(__any_sync(~0u, inside && bits[r] != 0))
                << (first + r) % kTileRows;
      }
    }
    if (lane == 0) {
      set_bits(d.row_bits + row_tile, rows);
    }
    cols <<= lane * size % 32;
    for (int step = 1; step < 32 / size; step *= 2) {
      cols |= __shfl_xor_sync(~0u, cols, step);  // of the lanes that share a word
    }
    if (lane * size % 32 == 0 && cols != 0) {
      set_bits(d.col_bits + j / 32, cols);
    }
  }
  if (is_last_block(d.finished)) {
    write_positions(d.row_bits, d.a.rows, found.rows, found.n_rows);
    write_positions(d.col_bits, d.a.cols, found.cols, found.n_cols);
  }
}

template <class Key, class Index>
void launch_detect(Matrix<const Key> a, Key limit, const Tensor& like, Found<Index> found) {
  constexpr int size = Pack<Key>::size;
  const int64_t row_words = num_blocks(a.rows, 32), col_words = num_blocks(a.cols, 32);
  const Tensor scratch = zeros_on(like, row_words + col_words + 1, ScalarType::Int);
  uint32_t* bits = static_cast<uint32_t*>(scratch.mutable_data_ptr());
  const Detection<Key> detection{
      a, limit, bits, bits + row_words,
      reinterpret_cast<unsigned int*>(bits + row_words + col_words)};
  const int64_t tiles = num_blocks(a.rows, kTileRows) * num_blocks(a.cols, 32 * size);
  const int64_t blocks = std::clamp<int64_t>(
      num_blocks(tiles, kDetectThreads / 32), 1, 8 * multiprocessors(like));
  const bool vector = a.col_stride == 1 && is_aligned_to_pack(a.data) &&
                      (a.row_stride % size == 0 || a.rows <= 1);
  const cudaStream_t stream = current_stream(like);
  if (vector) {
    detect<true, Key, Index><<<blocks, kDetectThreads, 0, stream>>>(detection, found);
  } else {
    detect<false, Key, Index><<<blocks, kDetectThreads, 0, stream>>>(detection, found);
  }
  check_launch();
}

// rows [b], cols [c], counts [2]
template <class Index>
std::tuple<Tensor, Tensor, Tensor> find_rows_cols(const Tensor& a, double tol) {
  check_matrix("a", a);
  const DeviceGuard guard(a.get_device_index());
  const Tensor rows = empty_on(a, a.size(0), dtype_of<Index>);
  const Tensor cols = empty_on(a, a.size(1), dtype_of<Index>);
  const Tensor counts = empty_on(a, 2, dtype_of<Index>);
  dispatch_float(a.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using Key = bits_t<T>;
    const Matrix<const Key> m = matrix<Key>(a);
    Index* n = static_cast<Index*>(counts.mutable_data_ptr());
    const Found<Index> found{
        static_cast<Index*>(rows.mutable_data_ptr()), static_cast<Index*>(cols.mutable_data_ptr()),
        n, n + 1};
    // Memory is walked along its shorter stride.
    const bool swap = m.rows > 1 && m.cols > 1 && m.row_stride < m.col_stride;
    const Key limit = magnitude(std::bit_cast<Key>(static_cast<T>(tol)));
    launch_detect(swap ? m.transposed() : m, limit, a, swap ? found.transposed() : found);
  });
  return {rows, cols, counts};
}

}  // namespace
}  // namespace sparsegrad
