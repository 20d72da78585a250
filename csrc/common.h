// What the kernels share: matrices with strides, the bits of a magnitude, dtype dispatch; and the
// CPU's threads, and loops compiled for the instruction set of the CPU they run on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// A lambda or function so marked becomes part of the loop that `simd` compiles.
#define SPARSEGRAD_INLINE __attribute__((always_inline))

namespace sparsegrad {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- SIMD: `simd(f)` calls the SPARSEGRAD_INLINE lambda f, compiled for this CPU. ----

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSEGRAD_AVX2 "avx2,fma,bmi,bmi2"
#define SPARSEGRAD_AVX512 SPARSEGRAD_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"

template <class F>
__attribute__((target(SPARSEGRAD_AVX512), noinline)) void call_avx512(const F& f) {
  f();
}

template <class F>
__attribute__((target(SPARSEGRAD_AVX2), noinline)) void call_avx2(const F& f) {
  f();
}

inline int simd_level() {
  static const int level = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? 2 : 1) : 0;
  }();
  return level;
}

template <class F>
void simd(const F& f) {
  switch (simd_level()) {
    case 2:
      return call_avx512(f);
    case 1:
      return call_avx2(f);
    default:
      return f();
  }
}
#else
template <class F>
void simd(const F& f) {
  f();
}
#endif

// ---- Matrices ----

// `T` is const where the matrix is only read. Strides are in elements, and may be 0.
// constexpr is what nvcc lets device code call.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride;

  constexpr T* row(int64_t i) const {
    return data + i * row_stride;
  }
  constexpr T& operator()(int64_t i, int64_t j) const {
    return data[i * row_stride + j * col_stride];
  }
  constexpr Matrix transposed() const {
    return {data, cols, rows, col_stride, row_stride};
  }
  constexpr bool contiguous() const {
    return (col_stride == 1 || cols <= 1) && (row_stride == cols || rows <= 1);
  }
};

inline void check_matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have dtype ", dtype);
}

inline void check_size(const char* name, int64_t got, int64_t wanted) {
  STD_TORCH_CHECK(got == wanted, name, " must have size ", wanted, ", got ", got);
}

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <class T>
Matrix<T> mutable_matrix(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::empty({size.begin(), size.size()}, dtype);
}

// ---- Dtypes ----

template <class T>
struct tag {
  using type = T;
};

// f(tag<T>{}) with the C++ type of a floating dtype.
template <class F>
auto dispatch_float(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(tag<float>{});
    case ScalarType::Double:
      return f(tag<double>{});
    case ScalarType::BFloat16:
      return f(tag<BFloat16>{});
    default:
      STD_TORCH_CHECK(
          dtype == ScalarType::Half,
          "dtype must be float32, float64, bfloat16 or float16, got ",
          dtype);
      return f(tag<Half>{});
  }
}

// What T is computed in: float32 or wider.
template <class T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A magnitude's bits, as an integer, have the magnitude's order: kernels that only compare
// read floats as integers of their size.
template <class T>
using bits_t = std::conditional_t<
    sizeof(T) == 8,
    int64_t,
    std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

template <class Key>
SPARSEGRAD_INLINE constexpr Key magnitude(Key bits) {
  return bits & std::numeric_limits<Key>::max();
}

template <class T>
bits_t<T> infinity_bits() {
  return std::bit_cast<bits_t<T>>(T(std::numeric_limits<float>::infinity()));
}

// f(tag<Key>{}, bits of infinity)
template <class F>
auto dispatch_bits(ScalarType dtype, const F& f) {
  return dispatch_float(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return f(tag<bits_t<T>>{}, infinity_bits<T>());
  });
}

// f(tag<U>{}) with an unsigned type of the dtype's size, for kernels that only move elements.
template <class F>
auto dispatch_size(ScalarType dtype, const F& f) {
  return dispatch_bits(dtype, [&](auto key, auto) { return f(key); });
}

// ---- Threads ----

// How many threads `work` elements are worth, at least `grain` for each.
inline int64_t num_chunks(int64_t work, int64_t grain) {
  if (work < 2 * grain) {
    return 1;
  }
  return std::min<int64_t>(torch::stable::get_num_threads(), work / grain);
}

// f(chunk) for each chunk of n, in parallel.
template <class F>
void for_chunks(int64_t n, const F& f) {
  if (n == 1) {
    return f(int64_t{0});
  }
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      f(chunk);
    }
  });
}

// f(begin, end) over [0, n) in parallel, at least `grain` elements for each thread.
template <class F>
void for_range(int64_t n, int64_t grain, const F& f) {
  const int64_t chunks = num_chunks(n, grain);
  for_chunks(chunks, [&](int64_t c) { f(n * c / chunks, n * (c + 1) / chunks); });
}

// Nothing is written before all indices [2, n] are known to lie in a matrix.
inline void check_indices(Matrix<const int64_t> indices, int64_t rows, int64_t cols) {
  for_range(indices.cols, 1 << 14, [&](int64_t begin, int64_t end) {
    bool inside = true;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t i = indices(0, e), j = indices(1, e);
      inside &= (i >= 0) & (i < rows) & (j >= 0) & (j < cols);
    }
    STD_TORCH_CHECK(inside, "indices must lie in [0, ", rows, ") x [0, ", cols, ")");
  });
}

// ---- torch's own operators ----

// No graph is recorded for what a kernel calls: its gradient is registered, or it has none.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    aoti_torch_grad_mode_set_enabled(before_);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// Call an operator whose arguments are all tensors and which returns one.
template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor mm(const Tensor& a, const Tensor& b) {
  return call("aten::mm", "", a, b);
}

inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  call("aten::mm", "out", a, b, out);
}

// Autograd must see that `t` is written, as by an in-place operator of torch, and may refuse it.
// A tensor that is copied to itself stays as it is: this only counts up its version.
inline void mark_written(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(
      aoti_torch_copy_(t.get(), t.get(), 0) == AOTI_TORCH_SUCCESS, name,
      " may not be written in place: it requires a gradient, and this is not under "
      "torch.no_grad(), or it was made under torch.inference_mode()");
}

}  // namespace sparsegrad
