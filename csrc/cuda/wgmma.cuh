// The instructions of sm_90a by which a warpgroup, 4 warps, multiplies matrices in shared memory.
//
// Both operands lie there as rows of 128 bytes, which start at multiples of 1024. Of the eight
// vectors of 16 bytes in row r the one at place v holds those of index v ^ (r % 8), so that
// neither rows nor columns of vectors meet a bank twice. Of an operand [outer, depth]
//
//   depth contiguous   a row is one outer index and 64 depths;
//   outer contiguous   a row is one depth and 64 outer indices; the rows of all depths, and then
//                      those of the next 64 outer indices.
#pragma once

#include "mma.cuh"

namespace sparsegrad {

constexpr int kSwizzledRow = 128;               // bytes
constexpr int kSwizzledAtom = 8 * kSwizzledRow;  // after which the order of vectors repeats

__device__ __forceinline__ int swizzled(int row, int vector) {
  return row * kSwizzledRow + (vector ^ row % 8) * 16;
}

// Where an operand is, for wgmma. `leading`: bytes from 64 outer indices to the next 64, where
// these are contiguous. From 8 rows to the next 8 it is an atom.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int leading) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{kSwizzledAtom / 16} << 32 | uint64_t(leading / 16) << 16 |
         (address & 0x3ffff) / 16;
}

// Copy 16 bytes from global to shared memory, or as many zeros, and then `from` may be any address.
__device__ __forceinline__ void copy_vector_async(uint32_t to, const void* from, bool taken) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(taken ? 16 : 0)
               : "memory");
}

// from + index * stride in bytes, by one instruction: a compiler would multiply 64 bits.
__device__ __forceinline__ const unsigned char* at(
    const unsigned char* from, uint32_t index, uint32_t stride) {
  const unsigned char* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(index), "r"(stride), "l"(from));
  return to;
}

// What this thread wrote to shared memory is seen by the wgmma that follow a barrier.
__device__ __forceinline__ void fence_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before a wgmma adds to registers that were written otherwise.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the kPending newest groups of this warpgroup's multiplications are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads and writes of the sums past this point.
template <int kSize>
__device__ __forceinline__ void pin(float (&sums)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+f"(sums[i])::"memory");
  }
}

// c [64, 128] += a [64, 16] b [16, 128], accumulated in float32. Of lane l of warp w sum 4 j + i is
// at row 16 w + l / 4 + i / 2 * 8, column 8 j + l % 4 * 2 + i % 2.
#define SPARSEGRAD_8_SUMS(i)                                                              \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define SPARSEGRAD_WGMMA(types)                                                         \
  asm volatile(                                                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {"                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, 1, 1, 1, %66, %67;"                                                    \
      : SPARSEGRAD_8_SUMS(0), SPARSEGRAD_8_SUMS(8), SPARSEGRAD_8_SUMS(16),              \
        SPARSEGRAD_8_SUMS(24), SPARSEGRAD_8_SUMS(32), SPARSEGRAD_8_SUMS(40),            \
        SPARSEGRAD_8_SUMS(48), SPARSEGRAD_8_SUMS(56)                                    \
      : "l"(a), "l"(b), "n"(int{kAOuterContiguous}), "n"(int{kBOuterContiguous}))

template <class T, bool kAOuterContiguous, bool kBOuterContiguous>
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    SPARSEGRAD_WGMMA("bf16.bf16");
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>);
    SPARSEGRAD_WGMMA("f16.f16");
  }
}
#undef SPARSEGRAD_WGMMA
#undef SPARSEGRAD_8_SUMS

}  // namespace sparsegrad
