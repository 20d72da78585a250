// What the CUDA launchers share: the device and stream of a tensor, and checks.
//
// A launcher checks its arguments with a message, returns early where there is nothing to do, makes
// the tensors' device current, launches on torch's current stream, and checks the launch. It never
// waits for the device, so that it can be captured in a graph.
#pragma once

#include "../common.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

namespace sparsegrad {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// After each <<< >>>: a launch that the device refuses is an error here and not at a later call.
inline void check_launch() {
  check_cuda(cudaGetLastError());
}

inline void check_device(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(
      t.is_cuda() && t.get_device_index() == like.get_device_index(),
      name, " must be on the CUDA device ", like.get_device_index());
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors(const Tensor& t) {
  int count = 0;
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}

// Whether the user lets torch multiply matrices of this dtype as tf32, now. torch's flag is not part
// of the stable ABI; the operator reads it in Python, on the host.
inline bool allows_tf32(ScalarType dtype) {
  if (dtype != ScalarType::Float) {
    return false;
  }
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "sparsegrad_kernels::_allow_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// How many blocks of `size` elements hold n.
constexpr int64_t num_blocks(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

template <class T>
constexpr ScalarType dtype_of = std::is_same_v<T, double>     ? ScalarType::Double
                                : std::is_same_v<T, float>    ? ScalarType::Float
                                : std::is_same_v<T, Half>     ? ScalarType::Half
                                : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                                : std::is_same_v<T, int32_t>  ? ScalarType::Int
                                                              : ScalarType::Long;

// Contiguous tensors on the device of `like`. By this way the host needs a quarter of the time that
// torch::stable::new_empty takes, and a step makes about twenty of them.
template <size_t kDims>
Tensor empty_on(
    const Tensor& like, const std::array<int64_t, kDims>& sizes, ScalarType dtype) {
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  for (size_t i = kDims; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const auto type = torch::stable::detail::from(dtype);
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      kDims, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(type),
      aoti_torch_device_type_cuda(), like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor empty_on(const Tensor& like, int64_t n, ScalarType dtype) {
  return empty_on(like, std::array{n}, dtype);
}

inline Tensor empty_on(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype) {
  return empty_on(like, std::array{rows, cols}, dtype);
}

inline Tensor zeros_on(const Tensor& like, int64_t n, ScalarType dtype) {
  const Tensor made = empty_on(like, n, dtype);
  if (n > 0) {
    const size_t bytes = n * made.element_size();
    check_cuda(cudaMemsetAsync(made.mutable_data_ptr(), 0, bytes, current_stream(like)));
  }
  return made;
}

// Entries [2, k] of a matrix. An index out of bounds ends the kernel with an error, as torch's
// indexing does on CUDA: memory that belongs to others is never written.
struct Entries {
  Matrix<const int64_t> indices;
  int64_t rows, cols;

  __device__ void load(int64_t e, int64_t& i, int64_t& j) const {
    i = indices(0, e);
    j = indices(1, e);
    if (i < 0 || i >= rows || j < 0 || j >= cols) {
      __trap();
    }
  }
};

}  // namespace sparsegrad
