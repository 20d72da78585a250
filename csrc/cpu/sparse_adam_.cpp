// m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
// p -= lr sqrt(1 - b2^step) / (1 - b1^step) m / (sqrt(v) + eps),   at the given entries.
//
// Where b1 is 0 no m need be kept. v of 16 bits is rounded stochastically, with `step` as the seed:
// ops/sparse_adam_.py says why.
//
// Blocks of entries are loaded into contiguous arrays, updated there as vectors, and stored, while
// the next block's entries, each a cache miss, are on their way.
#include "../rounding.h"

namespace sparsegrad {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kGrain = 1 << 12;  // entries worth waking a thread for: 0.1 ms of cache misses

// a + weight (b - a), from the nearer end, as torch.lerp.
template <class W>
SPARSEGRAD_INLINE inline W lerp(W a, W b, W weight) {
  return weight < W(0.5) ? a + weight * (b - a) : b - (b - a) * (1 - weight);
}

template <class T>
void update(
    Matrix<T> param,
    std::optional<Matrix<T>> exp_avg,
    Matrix<T> exp_avg_sq,
    Matrix<const int64_t> indices,
    const T* values,
    int64_t value_stride,
    int64_t step,
    double step_size,
    double beta1,
    double beta2,
    double epsilon) {
  using W = wide_t<T>;
  const W weight1 = static_cast<W>(1 - beta1), weight2 = static_cast<W>(1 - beta2);
  const W size = static_cast<W>(step_size), eps = static_cast<W>(epsilon);
  for_range(indices.cols, kGrain, [&](int64_t begin, int64_t end) {
    simd([&]() SPARSEGRAD_INLINE {
      W p[kBlock], m[kBlock], v[kBlock], g[kBlock];
      for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t n = std::min(kBlock, end - first);
        for (int64_t e = first + kBlock; e < std::min(first + 2 * kBlock, end); ++e) {
          const int64_t i = indices(0, e), j = indices(1, e);
          __builtin_prefetch(&param(i, j), 1);
          if (exp_avg) {
            __builtin_prefetch(&(*exp_avg)(i, j), 1);
          }
          __builtin_prefetch(&exp_avg_sq(i, j), 1);
        }
        for (int64_t e = 0; e < n; ++e) {
          const int64_t i = indices(0, first + e), j = indices(1, first + e);
          p[e] = param(i, j);
          m[e] = exp_avg ? static_cast<W>((*exp_avg)(i, j)) : W(0);
          v[e] = exp_avg_sq(i, j);
          g[e] = values[(first + e) * value_stride];
        }
        for (int64_t e = 0; e < n; ++e) {
          m[e] = exp_avg ? lerp(m[e], g[e], weight1) : g[e];
          v[e] = lerp(v[e], g[e] * g[e], weight2);
          p[e] -= size * m[e] / (std::sqrt(v[e]) + eps);
        }
        for (int64_t e = 0; e < n; ++e) {
          const int64_t i = indices(0, first + e), j = indices(1, first + e);
          param(i, j) = static_cast<T>(p[e]);
          if (exp_avg) {
            (*exp_avg)(i, j) = static_cast<T>(m[e]);
          }
          if constexpr (sizeof(T) == 2) {
            T& old = exp_avg_sq(i, j);
            old = round_stochastically(v[e], old, i * exp_avg_sq.cols + j, step);
          } else {
            exp_avg_sq(i, j) = v[e];
          }
        }
      }
    });
  });
}

void sparse_adam_(
    const Tensor& param,
    const std::optional<Tensor>& exp_avg,
    const Tensor& exp_avg_sq,
    const Tensor& indices,
    const Tensor& values,
    int64_t step,
    double lr,
    double beta1,
    double beta2,
    double eps) {
  check_matrix("param", param);
  check_matrix("indices", indices);
  check_dtype("indices", indices, ScalarType::Long);
  const auto check_moment = [&](const char* name, const Tensor& t) {
    check_matrix(name, t);
    check_dtype(name, t, param.scalar_type());
    check_size(name, t.size(0), param.size(0));
    check_size(name, t.size(1), param.size(1));
  };
  check_moment("exp_avg_sq", exp_avg_sq);
  if (exp_avg) {
    check_moment("exp_avg", *exp_avg);
  } else {
    STD_TORCH_CHECK(beta1 == 0, "exp_avg may be None only where beta1 is 0");
  }
  check_dtype("values", values, param.scalar_type());
  STD_TORCH_CHECK(values.dim() == 1, "values must have 1 dimension, got ", values.dim());
  check_size("indices", indices.size(0), 2);
  check_size("indices", indices.size(1), values.size(0));
  const Matrix<const int64_t> entries = matrix<int64_t>(indices);
  check_indices(entries, param.size(0), param.size(1));
  mark_written("param", param);
  if (exp_avg) {
    mark_written("exp_avg", *exp_avg);
  }
  mark_written("exp_avg_sq", exp_avg_sq);
  const double size = lr * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
  dispatch_float(param.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    std::optional<Matrix<T>> first;
    if (exp_avg) {
      first = mutable_matrix<T>(*exp_avg);
    }
    update(
        mutable_matrix<T>(param), first, mutable_matrix<T>(exp_avg_sq),
        entries, static_cast<const T*>(values.const_data_ptr()), values.stride(0),
        step, size, beta1, beta2, eps);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("sparse_adam_", TORCH_BOX(&sparse_adam_));
}

}  // namespace sparsegrad
