// The last block to finish sees what all others wrote, and goes on with it; and they with what it
// writes, where they are resident together.
//
// One thread's fence stands for its block: the barrier beside it orders what the others did.
#pragma once

#include "common.cuh"

namespace sparsegrad {

// True in all threads of the block that comes here last. `finished` is 0 before the launch.
inline __device__ bool is_last_block(unsigned int* finished) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// By one block, all its threads; `gate` is 0 before the launch.
inline __device__ void open_gate(unsigned int* gate) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicExch(gate, 1u);
  }
}

// By all others, in a cooperative launch: elsewhere the one that opens it may never start.
inline __device__ void wait_at_gate(const volatile unsigned int* gate) {
  if (threadIdx.x == 0) {
    while (*gate == 0) {
      __nanosleep(32);
    }
    __threadfence();
  }
  __syncthreads();
}

}  // namespace sparsegrad
