// The last block of a launch sees what all others wrote, and goes on with it.
#pragma once

#include "common.cuh"

namespace sparsegrad {

// True in all threads of the block that comes here last. `finished` is 0 before the launch.
inline __device__ bool is_last_block(unsigned int* finished) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace sparsegrad
