// C[m, n] = sum_k A[rows[m], depths[k]] B[n, depths[k]]  with rows, depths and their counts on the
// device, where compact_indices left them: the host never waits for them.
//
// Blocks go over the tiles of C. Each tile's operands are gathered straight into shared memory,
// kStages steps ahead of the multiplication. Where there are fewer tiles than blocks, several
// blocks share a tile's depth, and the last of them to finish adds their sums, always in the same
// order. What is done with the sums is the epilogue's affair: it has
//
//   before(n_rows)     called by every block once with the number of kept rows, and
//   operator()(visit)  called per tile by all its threads: visit(f) calls, for all of the thread's
//                      sums, f(row, col, value, next, has_next) with references to those at
//                      [row, col] and [row, col + 1], row being the original one, rows[m].
#pragma once

#include <algorithm>

#include "axis.cuh"
#include "compacted.cuh"
#include "multiply_sm90.cuh"
#include "multiply_tf32.cuh"

namespace sparsegrad {

constexpr int kStages = 4;       // a power of 2
template <class M>
constexpr int kMinSteps = M::kWarpgroups ? 12 : 8;  // of depth that are worth a block of their own
constexpr int kBlocksPerSm = 2;

// For depths that several blocks share: a tile of sums per block, and per tile the blocks done.
template <class Sum>
struct Workspace {
  Sum* sums;
  int32_t* done;
};

// The sums of the depths [begin, end) of a tile.
template <class M>
  requires(!M::kWarpgroups)
__device__ __forceinline__ void accumulate(
    const Product<typename M::Element>& p, const int32_t* a_outer, const int32_t* b_outer,
    int32_t begin, int32_t end, const Axis& rows, const Axis& depths,
    typename M::Accumulator& acc) {
  using T = typename M::Element;
  constexpr int kSizeA = M::LayoutA::kSize, kSizeB = M::LayoutB::kSize;
  extern __shared__ uint4 shared_memory[];
  __shared__ int32_t depth_ids[kStages][M::kK];
  T* const a_tiles = reinterpret_cast<T*>(shared_memory);
  T* const b_tiles = a_tiles + kStages * kSizeA;
  const int thread = threadIdx.x;

  const auto depth_id = [&](int32_t k) {
    return k >= end || depths.is_left_out(k) ? -1 : depths.at(k);
  };
  const auto load = [&](int step) {
    const int slot = step % kStages;
    TileIndices indices{a_outer, depth_ids[slot], begin + step * M::kK, end};
    load_tile<typename M::LayoutA, M::kM, M::kK, M::kThreads>(
        a_tiles + slot * kSizeA, p.a, indices, rows.all || rows.masked,
        depths.all || depths.masked);
    indices.outer = b_outer;
    load_tile<typename M::LayoutB, M::kN, M::kK, M::kThreads>(
        b_tiles + slot * kSizeB, p.b, indices, true, depths.all);
  };

  const int steps = (end - begin + M::kK - 1) / M::kK;
  for (int i = thread; i < kStages * M::kK; i += M::kThreads) {
    depth_ids[i / M::kK][i % M::kK] = depth_id(begin + i);
  }
  // What this thread puts into depth_ids, a step before it is needed.
  int32_t next_id = -1;
  if (thread < M::kK) {
    next_id = depth_id(begin + kStages * M::kK + thread);
  }
  __syncthreads();
#pragma unroll 1
  for (int step = 1 - kStages; step < steps; ++step) {  // step < 0: the pipeline is being filled
    const int ahead = step + kStages - 1;
    if (step >= 0) {
      copies_wait<kStages - 2>();
      __syncthreads();
    }
    if (ahead < steps) {
      load(ahead);
      if (step >= 0 && thread < M::kK) {
        depth_ids[(ahead + 1) % kStages][thread] = next_id;
        next_id = depth_id(begin + (ahead + 2) * M::kK + thread);
      }
    }
    copies_commit();
    if (step >= 0) {
      M::multiply(a_tiles + step % kStages * kSizeA, b_tiles + step % kStages * kSizeB, acc);
    }
  }
  copies_wait<0>();
}

// Leave this block's sums for the others of its tile. The last of them gets all: true.
template <class M>
__device__ __forceinline__ bool add_splits(
    const Workspace<typename M::Sum>& workspace, int item, int splits,
    typename M::Accumulator& acc) {
  constexpr int kTile = M::kSums * M::kThreads;
  __shared__ bool is_last;
  const int tile = item / splits, split = item % splits;
  typename M::Sum* const sums = workspace.sums + int64_t{tile} * splits * kTile + threadIdx.x;
#pragma unroll
  for (int i = 0; i < M::kSums; ++i) {
    sums[int64_t{split} * kTile + i * M::kThreads] = acc.sum(i);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(workspace.done + tile, 1) == splits - 1;
  }
  __syncthreads();
  if (!is_last) {
    return false;
  }
  __threadfence();
#pragma unroll
  for (int i = 0; i < M::kSums; ++i) {
    acc.sum(i) = 0;
  }
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int i = 0; i < M::kSums; ++i) {
      acc.sum(i) += __ldcg(sums + int64_t{s} * kTile + i * M::kThreads);
    }
  }
  return true;
}

template <class M, class Epilogue>
__device__ __forceinline__ void multiply_tiles(
    const Product<typename M::Element>& p, const Workspace<typename M::Sum>& workspace,
    const Epilogue& epilogue) {
  __shared__ int32_t a_outer[M::kM], b_outer[M::kN];
  if (p.active != nullptr && *p.active == 0) {
    return;
  }
  const Axis rows(
      p.rows, p.n_rows, p.a.outer_size,
      M::LayoutA::kOuterContiguous && p.a.outer_vectors ? M::kMasked : 0);
  const bool along_depths = (!M::LayoutA::kOuterContiguous && p.a.depth_vectors) ||
                            (!M::LayoutB::kOuterContiguous && M::kWarpgroups);
  const Axis depths(p.depths, p.n_depths, p.depth_size, along_depths ? M::kMasked : 0);
  const int32_t n_rows = rows.n_positions(), n_depths = depths.n_positions();
  const int32_t n_cols = p.b.outer_size;
  epilogue.before(rows.n_kept);

  // How the work is cut.
  const int32_t col_tiles = num_blocks(n_cols, M::kN);
  const int32_t tiles = num_blocks(n_rows, M::kM) * col_tiles;
  const int32_t steps = num_blocks(n_depths, M::kK);
  int32_t splits = 1;
  const int32_t blocks = gridDim.x;
  if (workspace.sums != nullptr && 0 < tiles && tiles <= blocks / 2) {
    splits = max(1, min(blocks / tiles, steps / kMinSteps<M>));
  }
  // In shared memory, as registers are scarce where tiles are multiplied.
  __shared__ struct {
    int32_t col_tiles, splits, depth_per_split, items;
  } cut;
  if (threadIdx.x == 0) {
    cut = {col_tiles, splits, (steps + splits - 1) / splits * M::kK, tiles * splits};
  }
  __syncthreads();

  for (int32_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    __syncthreads();  // the last tile's indices have been used
    const int32_t tile = item / cut.splits;
    const int32_t m0 = tile / cut.col_tiles * M::kM, n0 = tile % cut.col_tiles * M::kN;
    for (int i = threadIdx.x; i < M::kM; i += M::kThreads) {
      a_outer[i] = m0 + i < n_rows ? rows.at(m0 + i) : -1;
    }
    for (int i = threadIdx.x; i < M::kN; i += M::kThreads) {
      b_outer[i] = n0 + i < n_cols ? n0 + i : -1;
    }

    typename M::Accumulator acc;
    const int32_t begin = min((item % cut.splits) * cut.depth_per_split, n_depths);
    const int32_t end = min(begin + cut.depth_per_split, n_depths);
    accumulate<M>(p, a_outer, b_outer, begin, end, rows, depths, acc);
    if (cut.splits > 1 && !add_splits<M>(workspace, item, cut.splits, acc)) {
      continue;
    }
    if (rows.masked) {
      __syncthreads();
      for (int i = threadIdx.x; i < M::kM; i += M::kThreads) {
        if (a_outer[i] >= 0 && rows.is_left_out(a_outer[i])) {
          a_outer[i] = -1;
        }
      }
      __syncthreads();
    }
    epilogue([&](const auto& f) {
      M::for_pairs(acc, [&](int m, int n, auto& value, auto& next) {
        const int32_t row = a_outer[m], col = b_outer[n];
        if (row >= 0 && col >= 0) {
          f(row, col, value, next, b_outer[n + 1] >= 0);
        }
      });
    });
  }
}

template <class M, class Epilogue>
__global__ void __launch_bounds__(M::kThreads, kBlocksPerSm) product_kernel(
    const Product<typename M::Element> p, const Workspace<typename M::Sum> workspace,
    const Epilogue epilogue) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (!M::kWarpgroups)
#endif
  {
    multiply_tiles<M>(p, workspace, epilogue);
  }
}

// Whether the machine code of a kernel that the current device runs is more than an empty body:
// only then does it declare shared memory.
template <class Kernel>
bool has_code(Kernel kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.sharedSizeBytes > 0;
}

// Whether Warpgroups can read the operand: in whole vectors along its layout's contiguous axis, and
// across it in steps that 32 bits hold. Positions on an axis of consecutive depths are those of all
// depths: neither operand may have the kept ones alone.
template <bool kOuterContiguous, class T>
bool suits_warpgroups(const Operand<T>& x, const Product<T>& p) {
  constexpr int kVector = 16 / sizeof(T);
  if constexpr (kOuterContiguous) {
    return x.outer_vectors && x.outer_size % kVector == 0 &&
           x.depth_stride * int64_t{sizeof(T)} >> 32 == 0;
  }
  return x.depth_vectors && p.depth_size % kVector == 0 && p.a.gather_depth && p.b.gather_depth &&
         x.outer_size * x.outer_stride / kVector >> 32 == 0;
}

// The operand of which axis `outer` of the matrix t is the outer one.
template <class T>
Operand<T> operand(const Tensor& t, int outer, bool gather_depth) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const int64_t outer_stride = t.stride(outer), depth_stride = t.stride(1 - outer);
  const T* data = static_cast<const T*>(t.const_data_ptr());
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {
      data,
      outer_stride,
      depth_stride,
      static_cast<int32_t>(t.size(outer)),
      gather_depth,
      aligned && outer_stride == 1 && depth_stride % kVector == 0,
      aligned && depth_stride == 1 && outer_stride % kVector == 0};
}

// Shared memory that a launch asks for.
template <class M>
constexpr int bytes_of_stages() {
  if constexpr (M::kWarpgroups) {
    return M::kBytes;
  } else {
    return kStages * (M::LayoutA::kSize + M::LayoutB::kSize) * sizeof(typename M::Element);
  }
}

// `like`: a tensor on the device. Nothing of the product may be empty.
template <class M, class Epilogue>
void launch_product(
    const Tensor& like, const Product<typename M::Element>& p, const Epilogue& epilogue) {
  using Sum = typename M::Sum;
  const int64_t tiles = num_blocks(p.a.outer_size, M::kM) * num_blocks(p.b.outer_size, M::kN);
  const int64_t max_splits = std::max<int64_t>(1, num_blocks(p.depth_size, M::kK) / kMinSteps<M>);
  const int64_t blocks = std::min<int64_t>(
      tiles * max_splits, int64_t{kBlocksPerSm} * multiprocessors(like));

  // Tiles may be few though the host counts many: what is kept is known on the device only.
  Workspace<Sum> workspace{};
  Tensor sums, done;
  if (max_splits > 1) {
    sums = empty_on(like, blocks * M::kSums * M::kThreads, dtype_of<Sum>);
    done = zeros_on(like, blocks, ScalarType::Int);
    workspace.sums = static_cast<Sum*>(sums.mutable_data_ptr());
    workspace.done = static_cast<int32_t*>(done.mutable_data_ptr());
  }
  constexpr int kBytes = bytes_of_stages<M>();
  const auto kernel = product_kernel<M, Epilogue>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<blocks, M::kThreads, kBytes, current_stream(like)>>>(p, workspace, epilogue);
  check_launch();
}

// The same with how its type is multiplied. The tensor cores read tiles of either layout.
template <bool kAOuterContiguous, bool kBOuterContiguous, class T, class Epilogue>
void launch_product_as(const Tensor& like, const Product<T>& p, const Epilogue& epilogue) {
  if constexpr (sizeof(T) == 2) {
    using Hopper = Warpgroups<T, kAOuterContiguous, kBOuterContiguous>;
    if (suits_warpgroups<kAOuterContiguous>(p.a, p) &&
        suits_warpgroups<kBOuterContiguous>(p.b, p) &&
        has_code(product_kernel<Hopper, Epilogue>)) {
      return launch_product<Hopper>(like, p, epilogue);
    }
    return launch_product<TensorCore<T, kAOuterContiguous, kBOuterContiguous>>(like, p, epilogue);
  } else {
    if constexpr (std::is_same_v<T, float>) {
      if (p.tf32) {
        return launch_product<TensorCoreTf32<kAOuterContiguous, kBOuterContiguous>>(
            like, p, epilogue);
      }
    }
    launch_product<FusedMultiplyAdd<T>>(like, p, epilogue);
  }
}

// The same with the layouts that the operands ask for: alike whatever the epilogue, and so are the
// sums, to the bit.
template <class T, class Epilogue>
void launch_product_of(const Tensor& like, const Product<T>& p, const Epilogue& epilogue) {
  if (p.a.depth_stride == 1) {
    if (p.b.depth_stride == 1) {
      return launch_product_as<false, false>(like, p, epilogue);
    }
    return launch_product_as<false, true>(like, p, epilogue);
  } else if (p.b.depth_stride == 1) {
    return launch_product_as<true, false>(like, p, epilogue);
  }
  launch_product_as<true, true>(like, p, epilogue);
}

}  // namespace sparsegrad
