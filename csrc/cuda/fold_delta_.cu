// W += V^T delta U, then delta = 0, for a delta with about k entries that are not zero; the seed,
// if any, is another afterwards.
//
// delta is read in place. With one basis, the identity being the other, or none, one kernel does
// all: see delta_times.cuh. With both, it makes the factor delta^T V or delta U, whichever takes
// fewer multiply-adds, and the dense product of that and the other basis is added to W: on the
// tensor cores here for 16 bits, else by torch. k decides on that only: any delta is right. Where
// float32 may be multiplied as tf32, torch's dense products do all; and those of bfloat16 where both
// bases come in bfloat16 to a float32 weight. A delta of another dtype than these read is copied.
//
// Sums have one order, that of delta's elements, so that bits do not vary.
//
// SASS: LDG\.E\.128
#include "add_product.cuh"
#include "compacted.cuh"
#include "delta_rounded.cuh"
#include "delta_rows.cuh"
#include "delta_strips.cuh"

namespace sparsegrad {
namespace {

// ---- delta basis ----

// to(outer, :) (+)= sum over inner of delta(outer, inner) basis(inner, :), and delta = 0.
template <class T, class To>
void launch_delta_times(
    const Tensor& like, const Matrix<T>& delta, const Tensor& by, const To& to,
    cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Matrix<const T> basis = matrix<T>(by);
  const bool vectors = takes_vectors(basis);
  if (vectors && takes_vectors(delta) && to.takes_rows()) {
    return launch_delta_rows<kVector>(delta, basis, to, stream);
  }
  if (vectors && takes_vectors(delta.transposed()) && delta.rows % kStrip == 0 &&
      to.takes_columns()) {
    // Narrow strips read more of delta than they need: a little, compared with the basis.
    if constexpr (!To::kAdds) {
      if (delta.rows / kStrip < 2 * multiprocessors(like)) {
        return launch_delta_strips<kNarrowStrip>(delta, basis, to, stream);
      }
    }
    return launch_delta_strips<kStrip>(delta, basis, to, stream);
  }
  launch_delta_rows<1>(delta, basis, to, stream);
}

// ---- Without a basis ----

constexpr int kAddThreads = 256;
constexpr int kAddPacks = 4;  // a thread

template <class T, int kVector, class Round>
__global__ void __launch_bounds__(kAddThreads) add_delta(Matrix<T> delta, AddTo<T, Round> to) {
  using Vector = Pack<T, kVector>;
  const int64_t per_row = delta.cols / kVector, n = delta.rows * per_row;
  const int64_t first = int64_t{blockIdx.x} * kAddThreads * kAddPacks + threadIdx.x;
  Vector packs[kAddPacks], *places[kAddPacks];
#pragma unroll
  for (int s = 0; s < kAddPacks; ++s) {
    const int64_t i = first + s * kAddThreads;
    if (i < n) {
      places[s] = reinterpret_cast<Vector*>(&delta(i / per_row, i % per_row * kVector));
      packs[s] = *places[s];
    }
  }
#pragma unroll
  for (int s = 0; s < kAddPacks; ++s) {
    const int64_t i = first + s * kAddThreads;
    if (i >= n) {
      return;
    }
    bool any = false;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      any |= is_entry(packs[s].at[j]);
    }
    if (!any) {
      continue;
    }
    const int64_t row = i / per_row, col = i % per_row * kVector;
    Vector* const place = reinterpret_cast<Vector*>(&to.weight(row, col));
    Vector elements = *place;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (is_entry(packs[s].at[j])) {
        const wide_t<T> value = static_cast<wide_t<T>>(packs[s].at[j]);
        elements.at[j] = to.add(elements.at[j], value, row, col + j);
        packs[s].at[j] = static_cast<T>(0.0f);
      }
    }
    *place = elements;
    *places[s] = packs[s];
  }
}

template <int kVector, class T, class Round>
void launch_add_delta_as(
    const Matrix<T>& delta, const AddTo<T, Round>& to, cudaStream_t stream) {
  const int64_t packs = delta.rows * delta.cols / kVector;
  add_delta<T, kVector><<<num_blocks(packs, kAddThreads * kAddPacks), kAddThreads, 0, stream>>>(
      delta, to);
  check_launch();
}

template <class T, class Round>
void launch_add_delta(const Matrix<T>& delta, const AddTo<T, Round>& to, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (takes_vectors(delta) && to.takes_rows()) {
    return launch_add_delta_as<kVector>(delta, to, stream);
  }
  if (takes_vectors(delta.transposed()) && to.takes_columns()) {
    return launch_add_delta_as<kVector>(delta.transposed(), to.transposed(), stream);
  }
  launch_add_delta_as<1>(delta, to, stream);
}

// ---- With both ----

// On the tensor cores two dense products take less than gathering the rows that entries ask for;
// and much less where entries lie in few rows or columns, as those of a good basis do.
void fold_densely(
    const Tensor& weight, const Tensor& delta, const Tensor& u, const Tensor& v) {
  multiply_densely(weight, delta, u, v, true);
  zero(delta);
}

template <class T, class Round>
void fold_in_basis(
    const Tensor& weight, const Tensor& delta, const Tensor& u, const Tensor& v, int64_t k,
    const Round& round, cudaStream_t stream) {
  if (allows_tf32(weight.scalar_type())) {
    return fold_densely(weight, delta, u, v);
  }
  const int64_t n_out = weight.size(0), n_in = weight.size(1);
  const bool left_first =
      k * n_out + u.size(0) * n_in * n_out <= k * n_in + v.size(0) * n_in * n_out;
  const Tensor &kept_basis = left_first ? u : v, &basis = left_first ? v : u;
  const Matrix<T> read = mutable_matrix<T>(delta);

  // [parts * kept, width], its rows padded to 16 bytes
  constexpr int kParts = Round::kParts;
  const int64_t n_kept = kept_basis.size(0), width = basis.size(1);
  const int64_t pitch = (width + 7) / 8 * 8;
  Tensor factor = empty_on(weight, kParts * n_kept, pitch, weight.scalar_type());
  factor = torch::stable::narrow(factor, 1, 0, width);
  const Tensor depths = empty_on(weight, kParts > 1 ? kParts * n_kept : 0, ScalarType::Int);
  int32_t* const depth =
      kParts > 1 ? static_cast<int32_t*>(depths.mutable_data_ptr()) : nullptr;
  launch_delta_times(
      weight, left_first ? read.transposed() : read, basis,
      StoreFactor<T>{static_cast<T*>(factor.mutable_data_ptr()), pitch, kParts, depth}, stream);

  if constexpr (sizeof(T) == 2) {
    const Operand<T> made = operand<T>(factor, 1, false), kept = operand<T>(kept_basis, 1, true);
    add_product<T>(
        weight,
        Product<T>{
            .a = left_first ? made : kept,
            .b = left_first ? kept : made,
            .depth_size = static_cast<int32_t>(kParts * n_kept),
            .depths = depth},
        round);
  } else {
    const Tensor left = torch::stable::transpose(left_first ? factor : kept_basis, 0, 1);
    const Tensor& right = left_first ? kept_basis : factor;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(
        weight.get(), weight.get(), left.get(), right.get(), 1.0, 1.0));
  }
}

// ---- The operator ----

bool has_rounded_bases(
    const Tensor& weight, const std::optional<Tensor>& u, const std::optional<Tensor>& v) {
  return u.has_value() && v.has_value() && weight.scalar_type() == ScalarType::Float &&
         u->scalar_type() == ScalarType::BFloat16;
}

void check_fold_delta(
    const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& u,
    const std::optional<Tensor>& v) {
  check_sizes("weight", weight);
  check_sizes("delta", delta);
  dispatch_float(delta.scalar_type(), [](auto) {});
  check_device("delta", delta, weight);
  const ScalarType of_bases =
      has_rounded_bases(weight, u, v) ? ScalarType::BFloat16 : weight.scalar_type();
  const std::tuple<const char*, const std::optional<Tensor>&, int> bases[] = {
      {"v", v, 0}, {"u", u, 1}};
  for (const auto& [name, basis, axis] : bases) {
    if (basis.has_value()) {
      check_sizes(name, *basis);
      check_dtype(name, *basis, of_bases);
      check_device(name, *basis, weight);
      check_size(name, basis->size(1), weight.size(axis));
    }
    check_size("delta", delta.size(axis), basis.has_value() ? basis->size(0) : weight.size(axis));
  }
}

template <class T, class Round>
void fold(
    const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& u,
    const std::optional<Tensor>& v, int64_t k, const Round& round) {
  const cudaStream_t stream = current_stream(weight);
  if (u.has_value() && v.has_value()) {
    return fold_in_basis<T>(weight, delta, *u, *v, k, round, stream);
  }
  const Matrix<T> read = mutable_matrix<T>(delta);
  const AddTo<T, Round> to{mutable_matrix<T>(weight), weight.size(1), 1, round};
  if (u.has_value()) {
    launch_delta_times(weight, read, *u, to, stream);
  } else if (v.has_value()) {
    launch_delta_times(weight, read.transposed(), *v, to.transposed(), stream);
  } else {
    launch_add_delta(read, to, stream);
  }
}

void fold_as_rounds(
    const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& u,
    const std::optional<Tensor>& v, int64_t k, const std::optional<Tensor>& seed) {
  const ScalarType dtype = weight.scalar_type();
  if (!seed.has_value()) {
    return dispatch_float(dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      fold<T>(weight, delta, u, v, k, RoundNearest<T>{});
    });
  }
  const int64_t* const bits = static_cast<const int64_t*>(seed->const_data_ptr());
  if (dtype == ScalarType::BFloat16) {
    fold<BFloat16>(weight, delta, u, v, k, RoundStochastic<BFloat16>{bits});
  } else {
    fold<Half>(weight, delta, u, v, k, RoundStochastic<Half>{bits});
  }
}

__global__ void next_seed(int64_t* seed) {
  ++*seed;
}

void fold_delta_(
    const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& u,
    const std::optional<Tensor>& v, int64_t k, const std::optional<Tensor>& seed) {
  check_fold_delta(weight, delta, u, v);
  if (seed.has_value()) {
    STD_TORCH_CHECK(
        weight.element_size() == 2, "with a seed, weight must be bfloat16 or float16, got ",
        weight.scalar_type());
    check_dtype("seed", *seed, ScalarType::Long);
    check_size("seed", seed->numel(), 1);
    check_device("seed", *seed, weight);
    mark_written("seed", *seed);
  }
  mark_written("weight", weight);
  mark_written("delta", delta);
  const DeviceGuard on_device(weight.get_device_index());
  const NoGrad no_grad;
  if (weight.numel() > 0 && delta.numel() > 0) {
    const bool rounded = has_rounded_bases(weight, u, v);
    const ScalarType given = delta.scalar_type();
    const bool taken = rounded ? given == ScalarType::Float || given == ScalarType::BFloat16
                               : given == weight.scalar_type();
    Tensor read = delta;
    if (!taken) {
      read = empty_on(
          weight, delta.size(0), delta.size(1),
          rounded ? ScalarType::BFloat16 : weight.scalar_type());
      torch::stable::copy_(read, delta);
    }
    rounded ? fold_rounded(weight, read, *u, *v, current_stream(weight))
            : fold_as_rounds(weight, read, u, v, k, seed);
    if (!taken) {
      zero(delta);
    }
  } else {  // either may have elements
    zero(delta);
  }
  if (seed.has_value()) {
    next_seed<<<1, 1, 0, current_stream(weight)>>>(
        static_cast<int64_t*>(seed->mutable_data_ptr()));
    check_launch();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("_fold_delta_", TORCH_BOX(&fold_delta_));
}

}  // namespace sparsegrad
