// What a layer's backward pass makes of the tokens that have a gradient: g W, g^T x and the sum of g.
//
// One read of g finds those tokens and sums its columns, in parts of 32 tokens that a second, small
// kernel adds in their order. The products then gather the tokens.
//
// SASS: LDG\.E\.128, VOTE
#include "pack.cuh"
#include "store_product.cuh"

#include <cub/block/block_scan.cuh>

namespace sparsegrad {
namespace {

constexpr int kPartTokens = 32;   // a bit each in a word
constexpr int kScanThreads = 128;
constexpr int kFinishThreads = 256;
constexpr int kFinishCols = 32;   // of a block

// What the first kernel leaves to the second.
template <class T>
struct Parts {
  uint32_t* bits;    // [col_tiles, parts]: which tokens of a part are not zero
  wide_t<T>* sums;   // [parts, cols], or null
  int32_t n_parts, n_col_tiles, n_cols;
};

// The elements of a token in columns [col, col + Pack::size); beyond the end: 0.
template <bool kVector, class T>
__device__ __forceinline__ Pack<T> load_token(const Matrix<const T>& g, int64_t token, int64_t col) {
  if (kVector && col + Pack<T>::size <= g.cols) {
    return *reinterpret_cast<const Pack<T>*>(g.row(token) + col);
  }
  Pack<T> pack;
#pragma unroll
  for (int v = 0; v < Pack<T>::size; ++v) {
    pack.at[v] = col + v < g.cols ? g(token, col + v) : T(0.0f);
  }
  return pack;
}

// A warp takes a part of the tokens and as many columns as its lanes hold in 16 bytes each.
template <bool kVector, class T>
__global__ void __launch_bounds__(kScanThreads) scan_tokens(Matrix<const T> g, Parts<T> parts) {
  using Key = bits_t<T>;
  constexpr int n = Pack<T>::size, kAtOnce = kVector ? 8 : 1;
  const int64_t tile = int64_t{blockIdx.x} * (kScanThreads / 32) + threadIdx.x / 32;
  const int32_t part = static_cast<int32_t>(tile / parts.n_col_tiles);
  const int32_t col_tile = static_cast<int32_t>(tile % parts.n_col_tiles);
  if (part >= parts.n_parts) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const int64_t begin = int64_t{part} * kPartTokens, col = (int64_t{col_tile} * 32 + lane) * n;
  const int n_tokens = static_cast<int>(min(g.rows - begin, int64_t{kPartTokens}));
  wide_t<T> sums[n] = {};
  uint32_t bits = 0;
#pragma unroll 1
  for (int first = 0; first < n_tokens; first += kAtOnce) {
    Pack<T> packs[kAtOnce];  // all are asked for before any is waited for
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const int64_t token = begin + min(first + t, n_tokens - 1);
      packs[t] = load_token<kVector>(g, token, col);
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const bool inside = first + t < n_tokens;
      bool nonzero = false;
#pragma unroll
      for (int v = 0; v < n; ++v) {
        nonzero |= magnitude(__builtin_bit_cast(Key, packs[t].at[v])) != 0;
        sums[v] += inside ? static_cast<wide_t<T>>(packs[t].at[v]) : 0;
      }
      bits |= static_cast<uint32_t>(__any_sync(~0u, inside && nonzero)) << (first + t) % 32;
    }
  }
  if (lane == 0) {
    parts.bits[int64_t{col_tile} * parts.n_parts + part] = bits;
  }
  if (parts.sums != nullptr) {
#pragma unroll
    for (int v = 0; v < n; ++v) {
      if (col + v < g.cols) {
        parts.sums[int64_t{part} * parts.n_cols + col + v] = sums[v];
      }
    }
  }
}

// By one block: the tokens of the set bits, in order, and how many; from the end on the others.
template <class T>
__device__ void list_tokens(
    const Parts<T>& parts, int32_t n_all, int32_t* tokens, int32_t* n_tokens) {
  using Scan = cub::BlockScan<int32_t, kFinishThreads>;
  __shared__ typename Scan::TempStorage room;
  int32_t begin = 0;
  for (int32_t first = 0; first < parts.n_parts; first += kFinishThreads) {
    const int32_t part = first + threadIdx.x;
    uint32_t word = 0;
    if (part < parts.n_parts) {
      for (int32_t tile = 0; tile < parts.n_col_tiles; ++tile) {
        word |= parts.bits[int64_t{tile} * parts.n_parts + part];
      }
    }
    int32_t before, total;
    Scan(room).ExclusiveSum(__popc(word), before, total);
    const int32_t first_token = part * kPartTokens;
    int32_t* kept = tokens + begin + before;
    int32_t* left_out = tokens + n_all - 1 - (first_token - begin - before);
#pragma unroll 1
    for (int32_t token = first_token; token < min(n_all, first_token + kPartTokens); ++token) {
      *(word & 1 ? kept++ : left_out--) = token;
      word >>= 1;
    }
    begin += total;
    __syncthreads();  // `room` is used again
  }
  if (threadIdx.x == 0) {
    *n_tokens = begin;
  }
}

// The first block lists the tokens, each other one adds the parts of kFinishCols columns.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_tokens(
    Parts<T> parts, int32_t n_all, int32_t* tokens, int32_t* n_tokens, wide_t<T>* total) {
  if (blockIdx.x == 0) {
    return list_tokens(parts, n_all, tokens, n_tokens);
  }
  constexpr int kGroups = kFinishThreads / kFinishCols;
  __shared__ wide_t<T> sums[kGroups][kFinishCols];
  const int group = threadIdx.x / kFinishCols, lane = threadIdx.x % kFinishCols;
  const int32_t col = (blockIdx.x - 1) * kFinishCols + lane;
  wide_t<T> sum = 0;
  if (col < parts.n_cols) {
#pragma unroll 8
    for (int32_t part = group; part < parts.n_parts; part += kGroups) {
      sum += parts.sums[int64_t{part} * parts.n_cols + col];
    }
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group == 0 && col < parts.n_cols) {
    for (int other = 1; other < kGroups; ++other) {
      sum += sums[other][lane];
    }
    total[col] = sum;
  }
}

// All tokens [T] int32, those with a gradient first and in order, their number [1], and the sum of
// g or nothing.
struct Tokens {
  Tensor list, count, sum;
};

template <class T>
Tokens find_tokens(const Tensor& g, bool wants_sum) {
  const Matrix<const T> m = matrix<T>(g);
  constexpr int n = Pack<T>::size;
  const int64_t n_parts = num_blocks(m.rows, kPartTokens), n_col_tiles = num_blocks(m.cols, 32 * n);
  const Tensor bits = empty_on(g, n_parts * n_col_tiles, ScalarType::Int);
  const Tensor sums = empty_on(g, wants_sum ? n_parts * m.cols : 0, dtype_of<wide_t<T>>);
  const Tokens tokens{
      empty_on(g, m.rows, ScalarType::Int), empty_on(g, 1, ScalarType::Int),
      empty_on(g, wants_sum ? m.cols : 0, dtype_of<wide_t<T>>)};
  const Parts<T> parts{
      static_cast<uint32_t*>(bits.mutable_data_ptr()),
      wants_sum ? static_cast<wide_t<T>*>(sums.mutable_data_ptr()) : nullptr,
      static_cast<int32_t>(n_parts), static_cast<int32_t>(n_col_tiles),
      static_cast<int32_t>(m.cols)};
  const cudaStream_t stream = current_stream(g);
  const int64_t blocks = num_blocks(n_parts * n_col_tiles, kScanThreads / 32);
  const bool vector = m.col_stride == 1 && is_aligned_to_pack(m.data) &&
                      (m.row_stride % n == 0 || m.rows <= 1);
  const auto scan = vector ? scan_tokens<true, T> : scan_tokens<false, T>;
  scan<<<blocks, kScanThreads, 0, stream>>>(m, parts);
  check_launch();
  const int64_t sum_blocks = wants_sum ? num_blocks(m.cols, kFinishCols) : 0;
  finish_tokens<T><<<1 + sum_blocks, kFinishThreads, 0, stream>>>(
      parts, static_cast<int32_t>(m.rows), static_cast<int32_t*>(tokens.list.mutable_data_ptr()),
      static_cast<int32_t*>(tokens.count.mutable_data_ptr()),
      static_cast<wide_t<T>*>(tokens.sum.mutable_data_ptr()));
  check_launch();
  return tokens;
}

void check_tokens(
    const Tensor& g, const std::optional<Tensor>& x, const std::optional<Tensor>& weight) {
  check_sizes("g", g);
  if (x.has_value()) {
    check_sizes("x", *x);
    check_dtype("x", *x, g.scalar_type());
    check_device("x", *x, g);
    check_size("x", x->size(0), g.size(0));
  }
  if (weight.has_value()) {
    check_sizes("weight", *weight);
    check_dtype("weight", *weight, g.scalar_type());
    check_device("weight", *weight, g);
    check_size("weight", weight->size(0), g.size(1));
  }
}

// g W [T, in], g^T x [out, in] and the sum of g [out]; of what is not asked for, nothing [0].
std::tuple<Tensor, Tensor, Tensor> token_products(
    const Tensor& g, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    bool wants_sum) {
  check_tokens(g, x, weight);
  const DeviceGuard on_device(g.get_device_index());
  const NoGrad no_grad;
  const Tensor nothing = empty_on(g, 0, g.scalar_type());
  Tensor grad_input =
      weight ? empty_on(g, g.size(0), weight->size(1), g.scalar_type()) : nothing;
  Tensor product = x ? empty_on(g, g.size(1), x->size(1), g.scalar_type()) : nothing;
  return dispatch_float(g.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    if (g.numel() == 0) {
      const Tensor sum = empty_on(g, wants_sum ? g.size(1) : 0, dtype_of<wide_t<T>>);
      for (Tensor one : {grad_input, product, sum}) {
        torch::stable::zero_(one);
      }
      return std::tuple<Tensor, Tensor, Tensor>{grad_input, product, sum};
    }
    const Tokens tokens = find_tokens<T>(g, wants_sum);
    const int32_t* const list = static_cast<const int32_t*>(tokens.list.const_data_ptr());
    const int32_t* const count = static_cast<const int32_t*>(tokens.count.const_data_ptr());
    const bool tf32 = allows_tf32(g.scalar_type());
    if (grad_input.numel() != 0) {
      store_product<T>(
          grad_input, {.a = operand<T>(g, 0, true),
                       .b = operand<T>(*weight, 1, true),
                       .depth_size = static_cast<int32_t>(g.size(1)),
                       .rows = list,
                       .n_rows = count,
                       .tf32 = tf32},
          true);
    }
    if (product.numel() != 0) {
      store_product<T>(
          product, {.a = operand<T>(g, 1, true),
                    .b = operand<T>(*x, 1, true),
                    .depth_size = static_cast<int32_t>(g.size(0)),
                    .depths = list,
                    .n_depths = count,
                    .tf32 = tf32});
    }
    return std::tuple<Tensor, Tensor, Tensor>{grad_input, product, tokens.sum};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("_token_products", TORCH_BOX(&token_products));
}

}  // namespace sparsegrad
