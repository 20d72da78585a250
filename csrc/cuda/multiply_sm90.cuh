// Products of 16-bit types on Hopper: each of a block's two warpgroups multiplies half of a tile.
//
// The integer work of gathering is what bounds a product of tensor cores this fast. So vectors only
// are copied, always the same four of a stage and an operand by a thread; and an axis along which
// vectors lie is gone through in full, where the tensor cores multiply what is left out for little.
#pragma once

#include <limits>

#include "axis.cuh"
#include "wgmma.cuh"

namespace sparsegrad {

template <class T, bool kAOuterContiguous, bool kBOuterContiguous>
struct Warpgroups {
  using Element = T;
  using Sum = float;
  static constexpr int kM = 128, kN = 128, kK = 64, kThreads = 256, kSums = 64;
  static constexpr int kMasked = std::numeric_limits<int32_t>::max();
  static constexpr int kRooms = 3;  // for stages
  static constexpr int kTileBytes = kM * kK * sizeof(T);
  static constexpr int kBytes = 2 * kRooms * kTileBytes + kSwizzledAtom;  // one to align them
  static constexpr bool kWarpgroups = true;

  template <bool kOuterContiguous_>
  struct Layout {
    static constexpr bool kOuterContiguous = kOuterContiguous_;
  };
  using LayoutA = Layout<kAOuterContiguous>;
  using LayoutB = Layout<kBOuterContiguous>;

  struct Accumulator {
    float at[kSums] = {};
    __device__ __forceinline__ float& sum(int i) {
      return at[i];
    }
  };

  // Starts what a stage adds: `a` is where the warpgroup's rows are, half of the tile.
  static __device__ __forceinline__ void multiply(uint32_t a, uint32_t b, Accumulator& acc) {
    constexpr int kStepA = kAOuterContiguous ? 16 * kSwizzledRow : 16 * sizeof(T);
    constexpr int kStepB = kBOuterContiguous ? 16 * kSwizzledRow : 16 * sizeof(T);
    const uint64_t left = matrix_descriptor(a, kTileBytes / 2);
    const uint64_t right = matrix_descriptor(b, kTileBytes / 2);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      wgmma<T, kAOuterContiguous, kBOuterContiguous>(
          acc.at, left + k * kStepA / 16, right + k * kStepB / 16);
    }
  }

  template <class F>
  static __device__ __forceinline__ void for_pairs(Accumulator& acc, const F& f) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        float* sum = acc.at + 4 * j + 2 * half;
        f(row + half * 8, j * 8 + lane % 4 * 2, sum[0], sum[1]);
      }
    }
  }
};

// A thread's four vectors of each stage of an operand's tile [128 outer, 64 depths], to the same
// places in each. Of outer indices beyond the last it does not matter what is copied: their sums are
// never looked at. As vectors end where axes end, each is copied whole, or is 0.
//
// A stage's depths are in shared memory in such an order that a thread finds its four at once.
template <class T, bool kOuterContiguous>
struct StageCopy;

constexpr int kDepthStep = 16;

__device__ __forceinline__ int place_of_depth(int depth) {
  return depth % kDepthStep * 4 + depth / kDepthStep;
}

// The stage's first position along the depth, how many there are from there on, and of the thread's
// four depths their indices, -1 where one is left out.
struct StageDepths {
  int32_t position, left;
  int32_t ids[4];

  __device__ __forceinline__ StageDepths(const int32_t* places, int32_t position, int32_t end)
      : position(position), left(end - position) {
    const int4 four = reinterpret_cast<const int4*>(places)[threadIdx.x / 16];
    ids[0] = four.x;
    ids[1] = four.y;
    ids[2] = four.z;
    ids[3] = four.w;
  }
};

// Eight threads to a row of 64 depths, which are consecutive.
template <class T>
struct StageCopy<T, false> {
  static constexpr int kRows = 4, kRowStep = 32, kStep = kRowStep * kSwizzledRow;
  const unsigned char* from;
  uint32_t rows[kRows];  // vectors from there
  int depth, to;

  __device__ __forceinline__ StageCopy(const Operand<T>& x, const int32_t* outer, int32_t begin) {
    const int row = threadIdx.x / 8, vector = threadIdx.x % 8;
    depth = vector * 8;
    from = reinterpret_cast<const unsigned char*>(x.data + begin + depth);
    to = swizzled(row, vector);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = static_cast<uint32_t>(max(outer[row + i * kRowStep], 0) * (x.outer_stride / 8));
    }
  }

  __device__ __forceinline__ void operator()(uint32_t stage, const StageDepths& depths) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy_vector_async(stage + to + i * kStep, at(from, rows[i], 16), depth < depths.left);
    }
    from += kSwizzledRow;
  }

  // Zeros for depths that are left out: 0 times what is there may be NaN. Of this thread's vectors,
  // which have arrived.
  __device__ __forceinline__ void clear(unsigned char* stage, const int32_t* places) const {
    uint32_t kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t first = places[place_of_depth(depth + 2 * i)];
      const int32_t second = places[place_of_depth(depth + 2 * i + 1)];
      kept[i] = (first < 0 ? 0 : 0x0000ffff) | (second < 0 ? 0 : 0xffff0000);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      uint4& vector = *reinterpret_cast<uint4*>(stage + to + i * kStep);
      vector = {
          vector.x & kept[0], vector.y & kept[1], vector.z & kept[2], vector.w & kept[3]};
    }
  }
};

// Sixteen threads to a depth of 128 consecutive outer indices.
template <class T>
struct StageCopy<T, true> {
  static constexpr int kStep = kDepthStep * kSwizzledRow;
  const unsigned char* from;
  uint32_t stride;  // bytes
  int row, to;
  bool taken, gather_depth;

  __device__ __forceinline__ StageCopy(const Operand<T>& x, const int32_t* outer, int32_t)
      : stride(static_cast<uint32_t>(x.depth_stride * sizeof(T))),
        row(threadIdx.x / 16),
        gather_depth(x.gather_depth) {
    const int vector = threadIdx.x % 16;
    const int32_t first = outer[0] + vector * 8;
    from = reinterpret_cast<const unsigned char*>(x.data + first);
    to = vector / 8 * 64 * kSwizzledRow + swizzled(row, vector % 8);
    taken = first < x.outer_size;
  }

  __device__ __forceinline__ void operator()(uint32_t stage, const StageDepths& depths) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t id = depths.ids[i];
      const int32_t index = gather_depth ? id : depths.position + row + i * kDepthStep;
      copy_vector_async(stage + to + i * kStep, at(from, index, stride), taken && 0 <= id);
    }
  }
};

// The sums of the depths [begin, end) of a tile.
//
// While a stage is multiplied, the one before is waited for, and its room filled with the next but
// one. Two barriers: before a stage is read all threads' copies of it have arrived, and before room
// is written both warpgroups have read it.
template <class M>
  requires M::kWarpgroups
__device__ __forceinline__ void accumulate(
    const Product<typename M::Element>& p, const int32_t* a_outer, const int32_t* b_outer,
    int32_t begin, int32_t end, const Axis&, const Axis& depths, typename M::Accumulator& acc) {
  using T = typename M::Element;
  constexpr int kPlaces = 4;  // stages whose depths are known: a power of 2, more than kRooms
  extern __shared__ unsigned char stage_memory[];
  __shared__ alignas(16) int32_t places[kPlaces][M::kK];
  const int thread = threadIdx.x;
  const uint32_t memory = shared_address(stage_memory);
  const uint32_t a_tiles = (memory + kSwizzledAtom - 1) / kSwizzledAtom * kSwizzledAtom;
  const uint32_t b_tiles = a_tiles + M::kRooms * M::kTileBytes;
  const uint32_t my_a_tiles =
      a_tiles + __shfl_sync(~0u, thread / 128, 0) * (M::kTileBytes / 2);  // known to be uniform

  const auto depth_id = [&](int32_t k) {
    return k >= end || depths.is_left_out(k) ? -1 : depths.at(k);
  };
  for (int i = thread; i < M::kRooms * M::kK; i += M::kThreads) {
    places[i / M::kK][place_of_depth(i % M::kK)] = depth_id(begin + i);
  }
  // What this thread puts into places, a step before it is needed.
  int32_t next_id = -1;
  if (thread < M::kK) {
    next_id = depth_id(begin + M::kRooms * M::kK + thread);
  }
  __syncthreads();

  StageCopy<T, M::LayoutA::kOuterContiguous> copy_a(p.a, a_outer, begin);
  StageCopy<T, M::LayoutB::kOuterContiguous> copy_b(p.b, b_outer, begin);
  const int steps = (end - begin + M::kK - 1) / M::kK;
  const auto load = [&](int step, int slot) {
    if (step < steps) {
      const StageDepths stage(places[step % kPlaces], begin + step * M::kK, end);
      copy_a(a_tiles + slot * M::kTileBytes, stage);
      copy_b(b_tiles + slot * M::kTileBytes, stage);
    }
    copies_commit();
  };
  load(0, 0);
  load(1, 1);
  pin(acc.at);
  int slot = 0, free_slot = 2;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copies_wait<1>();
    if constexpr (!M::LayoutB::kOuterContiguous) {
      if (depths.masked) {
        copy_b.clear(
            stage_memory + (b_tiles - memory) + slot * M::kTileBytes, places[step % kPlaces]);
      }
    }
    fence_for_wgmma();
    __syncthreads();  // the stage has arrived, for all threads
    wgmma_begin();
    M::multiply(my_a_tiles + slot * M::kTileBytes, b_tiles + slot * M::kTileBytes, acc);
    wgmma_commit();
    wgmma_wait<1>();
    __syncthreads();  // the stage before has been read, by both warpgroups
    load(step + 2, free_slot);
    if (thread < M::kK) {
      places[(step + 3) % kPlaces][place_of_depth(thread)] = next_id;
      next_id = depth_id(begin + (step + 4) * M::kK + thread);
    }
    free_slot = slot;
    slot = slot == M::kRooms - 1 ? 0 : slot + 1;
  }
  copies_wait<0>();
  wgmma_wait<0>();
  pin(acc.at);
}

}  // namespace sparsegrad
