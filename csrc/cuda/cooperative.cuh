// Launches whose blocks are all resident at once, so that they can wait for each other.
#pragma once

#include "common.cuh"

namespace sparsegrad {

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// The most blocks of such a launch on the current device; 0: there can be none.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, int device) {
  int per_multiprocessor = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0));
  return int64_t{device_attribute(cudaDevAttrCooperativeLaunch, device)} * per_multiprocessor *
         device_attribute(cudaDevAttrMultiProcessorCount, device);
}

// False, and nothing is launched, where part of the device is kept for others.
template <class... Parameters, class... Arguments>
bool launch_together(
    void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned int>(blocks);
  config.blockDim = static_cast<unsigned int>(threads);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // which a later check would find
    return false;
  }
  check_cuda(error);
  return true;
}

}  // namespace sparsegrad
