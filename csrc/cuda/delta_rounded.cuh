// W += V^T delta U by dense products in bfloat16 of a delta and bases in bfloat16, for a W in
// float32: the update has bfloat16's digits, W keeps its own. A delta in float32 is rounded.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "delta_times.cuh"

namespace sparsegrad {
namespace {

constexpr int kRoundedThreads = 256;
constexpr int kRoundedPacks = 4;  // a thread

// load(s, row, col) for all of a thread's packs, so that loads are in flight together, then use.
template <int kVector, class Load, class Use>
__device__ __forceinline__ void for_packs(
    int64_t rows, int64_t cols, const Load& load, const Use& use) {
  const int64_t per_row = cols / kVector, n = rows * per_row;
  const int64_t first = int64_t{blockIdx.x} * kRoundedThreads * kRoundedPacks + threadIdx.x;
#pragma unroll
  for (int s = 0; s < kRoundedPacks; ++s) {
    const int64_t i = first + s * kRoundedThreads;
    if (i < n) {
      load(s, i / per_row, i % per_row * kVector);
    }
  }
#pragma unroll
  for (int s = 0; s < kRoundedPacks; ++s) {
    const int64_t i = first + s * kRoundedThreads;
    if (i < n) {
      use(s, i / per_row, i % per_row * kVector);
    }
  }
}

// rounded [rows, cols] = delta, and delta = 0.
template <int kVector>
__global__ void __launch_bounds__(kRoundedThreads)
    round_delta(Matrix<float> delta, BFloat16* rounded) {
  Pack<float, kVector> packs[kRoundedPacks];
  for_packs<kVector>(
      delta.rows, delta.cols,
      [&](int s, int64_t row, int64_t col) {
        packs[s] = *reinterpret_cast<const Pack<float, kVector>*>(&delta(row, col));
      },
      [&](int s, int64_t row, int64_t col) {
        Pack<BFloat16, kVector> out;
        bool any = false;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          any |= is_entry(packs[s].at[j]);
          out.at[j] = static_cast<BFloat16>(packs[s].at[j]);
          packs[s].at[j] = 0;
        }
        *reinterpret_cast<Pack<BFloat16, kVector>*>(rounded + row * delta.cols + col) = out;
        if (any) {
          *reinterpret_cast<Pack<float, kVector>*>(&delta(row, col)) = packs[s];
        }
      });
}

// weight += update [rows, cols].
template <int kVector>
__global__ void __launch_bounds__(kRoundedThreads)
    add_update(Matrix<float> weight, const BFloat16* update) {
  Pack<float, kVector> packs[kRoundedPacks];
  Pack<BFloat16, kVector> updates[kRoundedPacks];
  for_packs<kVector>(
      weight.rows, weight.cols,
      [&](int s, int64_t row, int64_t col) {
        packs[s] = *reinterpret_cast<const Pack<float, kVector>*>(&weight(row, col));
        updates[s] =
            *reinterpret_cast<const Pack<BFloat16, kVector>*>(update + row * weight.cols + col);
      },
      [&](int s, int64_t row, int64_t col) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          packs[s].at[j] += static_cast<float>(updates[s].at[j]);
        }
        *reinterpret_cast<Pack<float, kVector>*>(&weight(row, col)) = packs[s];
      });
}

// Calls f(std::integral_constant<int, floats of a pack>, blocks).
template <class F>
void launch_for_packs(const Matrix<float>& m, const F& f) {
  const auto as = [&](auto vector) {
    f(vector, num_blocks(m.rows * m.cols / vector, kRoundedThreads * kRoundedPacks));
    check_launch();
  };
  takes_vectors(m) ? as(std::integral_constant<int, 4>{}) : as(std::integral_constant<int, 1>{});
}

// to = a b, or to += a b.
inline void multiply_into(const Tensor& to, const Tensor& a, const Tensor& b, bool adds) {
  TORCH_ERROR_CODE_CHECK(
      adds ? aoti_torch_cuda_addmm_out(to.get(), to.get(), a.get(), b.get(), 1.0, 1.0)
           : aoti_torch_cuda_mm_out(to.get(), a.get(), b.get()));
}

// to = V^T delta U, or to += it, in the cheaper order.
inline void multiply_densely(
    const Tensor& to, const Tensor& delta, const Tensor& u, const Tensor& v, bool adds) {
  const int64_t n_out = v.size(1), n_in = u.size(1);
  const int64_t r_out = delta.size(0), r_in = delta.size(1);
  const bool left_first = n_out * r_in * (r_out + n_in) <= r_out * n_in * (r_in + n_out);
  const Tensor v_t = torch::stable::transpose(v, 0, 1);
  if (left_first) {
    const Tensor factor = empty_on(delta, n_out, r_in, delta.scalar_type());
    multiply_into(factor, v_t, delta, false);
    multiply_into(to, factor, u, adds);
  } else {
    const Tensor factor = empty_on(delta, r_out, n_in, delta.scalar_type());
    multiply_into(factor, delta, u, false);
    multiply_into(to, v_t, factor, adds);
  }
}

inline void zero(Tensor t) {
  torch::stable::zero_(t);
}

inline void fold_rounded(
    const Tensor& weight, const Tensor& delta, const Tensor& u, const Tensor& v,
    cudaStream_t stream) {
  const Tensor update = empty_on(u, weight.size(0), weight.size(1), u.scalar_type());
  const Matrix<float> to = mutable_matrix<float>(weight);
  if (delta.scalar_type() == ScalarType::Float) {
    const Tensor rounded = empty_on(u, delta.size(0), delta.size(1), u.scalar_type());
    const Matrix<float> read = mutable_matrix<float>(delta);
    launch_for_packs(read, [&](auto vector, int64_t blocks) {
      round_delta<vector><<<blocks, kRoundedThreads, 0, stream>>>(
          read, static_cast<BFloat16*>(rounded.mutable_data_ptr()));
    });
    multiply_densely(update, rounded, u, v, false);
  } else {
    multiply_densely(update, delta, u, v, false);
    zero(delta);
  }
  launch_for_packs(to, [&](auto vector, int64_t blocks) {
    add_update<vector><<<blocks, kRoundedThreads, 0, stream>>>(
        to, static_cast<const BFloat16*>(update.const_data_ptr()));
  });
}

}  // namespace
}  // namespace sparsegrad
