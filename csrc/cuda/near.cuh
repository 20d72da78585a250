// The k largest entries of a product, of which a threshold for them is nearly known.
//
// The product's epilogue keeps only what reaches the threshold: a shortlist, in an order of chance;
// sorted by linear index it is the same in every run. Where fewer than k entries came, or more than
// there is room for, or the threshold is none, the kernels that make the whole product do not exit
// at once. Only the device knows; the host launches everything.
//
// As a threshold is positive, rows that are left out of the product, and so 0, are not missed.
#pragma once

#include <cub/device/device_radix_sort.cuh>

#include "collect_product.cuh"
#include "store_product.cuh"

namespace sparsegrad {
namespace {

// Of normally distributed entries 7 times as many reach 0.8 of the threshold for 0.2% of them.
constexpr int64_t kRoomPerEntry = 8;
constexpr int64_t kRoomAtLeast = 1 << 12;
constexpr int64_t kRoomAtMost = (int64_t{1} << 31) - (1 << 10);  // cub counts in int32
constexpr int kNearThreads = 256;

__global__ void start_shortlist(const float* threshold, ShortlistState* state) {
  *state = {.count = 0, .wanted = 0.0f < *threshold && *threshold < INFINITY, .whole = 0};
}

// Slots without an entry are to be sorted behind all others.
__global__ void __launch_bounds__(kNearThreads) finish_shortlist(
    ShortlistState* state, int64_t k, int64_t* __restrict__ linear, int64_t capacity,
    int64_t beyond) {
  const int64_t count = static_cast<int64_t>(state->count);
  const int64_t thread = int64_t{blockIdx.x} * kNearThreads + threadIdx.x;
  if (thread == 0) {
    state->whole = count < k || count > capacity;
  }
  for (int64_t e = count + thread; e < capacity; e += int64_t{gridDim.x} * kNearThreads) {
    linear[e] = beyond;
  }
}

// By linear index below or equal to `beyond`.
template <class Key>
void sort_shortlist(
    const Tensor& linear, const Tensor& values, const Tensor& sorted_linear,
    const Tensor& sorted_values, int64_t beyond) {
  const auto sort = [&](void* room, size_t& bytes) {
    check_cuda(cub::DeviceRadixSort::SortPairs(
        room, bytes, static_cast<const int64_t*>(linear.const_data_ptr()),
        static_cast<int64_t*>(sorted_linear.mutable_data_ptr()),
        static_cast<const Key*>(values.const_data_ptr()),
        static_cast<Key*>(sorted_values.mutable_data_ptr()), static_cast<int>(linear.numel()), 0,
        std::bit_width(static_cast<uint64_t>(beyond)), current_stream(linear)));
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  const Tensor room = empty_on(linear, static_cast<int64_t>(bytes), ScalarType::Byte);
  sort(room.mutable_data_ptr(), bytes);
}

// topk_coo(the product, k) for k smaller than its size, nothing of the product being empty.
// `like`: a tensor of its dtype and device.
template <class T>
std::tuple<Tensor, Tensor> topk_near(
    const Tensor& like, Product<T> product, int64_t k, const Tensor& threshold) {
  const int64_t n_rows = product.a.outer_size, n_cols = product.b.outer_size, n = n_rows * n_cols;
  const int64_t capacity = std::min({n, kRoomPerEntry * k + kRoomAtLeast, kRoomAtMost});
  const Tensor linear = empty_on(like, capacity, ScalarType::Long);
  const Tensor values = empty_on(like, capacity, like.scalar_type());
  const Tensor sorted_linear = empty_on(like, capacity, ScalarType::Long);
  const Tensor sorted_values = empty_on(like, capacity, like.scalar_type());
  const Tensor state_memory = empty_on(like, sizeof(ShortlistState), ScalarType::Byte);
  ShortlistState* const state = static_cast<ShortlistState*>(state_memory.mutable_data_ptr());
  int64_t* const linear_data = static_cast<int64_t*>(linear.mutable_data_ptr());
  float* const lower = static_cast<float*>(threshold.mutable_data_ptr());
  const cudaStream_t stream = current_stream(like);

  start_shortlist<<<1, 1, 0, stream>>>(lower, state);
  check_launch();
  product.active = &state->wanted;
  collect_product<T>(
      like, product,
      CollectProduct<T>{
          lower, static_cast<int32_t>(n_cols), linear_data,
          static_cast<T*>(values.mutable_data_ptr()), capacity, state});
  const int64_t blocks =
      std::min<int64_t>(num_blocks(capacity, kNearThreads), 4 * multiprocessors(like));
  finish_shortlist<<<blocks, kNearThreads, 0, stream>>>(state, k, linear_data, capacity, n);
  check_launch();
  sort_shortlist<bits_t<T>>(linear, values, sorted_linear, sorted_values, n);

  const Tensor whole = empty_on(like, n_rows, n_cols, like.scalar_type());
  product.active = &state->whole;
  store_product<T>(whole, product);
  return topk_with_shortlist(
      whole, k,
      {state, static_cast<const int64_t*>(sorted_linear.const_data_ptr()),
       sorted_values.const_data_ptr(), capacity},
      lower);
}

}  // namespace
}  // namespace sparsegrad
