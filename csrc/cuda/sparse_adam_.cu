// m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
// p -= lr sqrt(1 - b2^step) / (1 - b1^step) m / (sqrt(v) + eps),   at the given entries.
//
// Where b1 is 0 no m need be kept. v of 16 bits is rounded stochastically, with `step` as the seed:
// ops/sparse_adam_.py says why.
//
// One thread for each entry. Neighbouring lanes take neighbouring entries, so where those are
// adjacent in a row the hardware merges their loads and stores: wider ones per thread gain nothing.
#include "../rounding.h"
#include "common.cuh"

namespace sparsegrad {
namespace {

constexpr int kThreads = 128;  // few, so that the entries of one layer reach all multiprocessors

// lr sqrt(1 - b2^step) / (1 - b1^step), known to the host.
struct HostStepSize {
  int64_t step;
  double size;

  __device__ double operator()() const {
    return size;
  }
  __device__ int64_t seed() const {
    return step;
  }
};

// A number on the device: its dtype is looked at there, by one thread of a block, so that it needs
// no kernels of its own.
struct Number {
  const void* data;
  ScalarType dtype;

  __device__ double load() const {
    switch (dtype) {
      case ScalarType::Int:
        return *static_cast<const int32_t*>(data);
      case ScalarType::Long:
        return static_cast<double>(*static_cast<const int64_t*>(data));
      case ScalarType::Float:
        return *static_cast<const float*>(data);
      case ScalarType::Double:
        return *static_cast<const double*>(data);
      case ScalarType::BFloat16:
        return static_cast<float>(*static_cast<const BFloat16*>(data));
      default:
        return static_cast<float>(*static_cast<const Half*>(data));
    }
  }
};

// The same where step and lr are on the device. b^step = exp(step log b).
struct DeviceStepSize {
  Number step, lr;
  double log_beta1, log_beta2;

  __device__ double operator()() const {
    const double n = step.load();
    return lr.load() * sqrt(-expm1(n * log_beta2)) / -expm1(n * log_beta1);
  }
  __device__ int64_t seed() const {
    return static_cast<int64_t>(step.load());
  }
};

template <class T>
struct State {
  Matrix<T> param, exp_avg, exp_avg_sq;
  bool keeps_first;  // else exp_avg is of no use
  Entries entries;
  const T* values;
  int64_t value_stride;
  wide_t<T> weight1, weight2, eps;
};

// a + weight (b - a), from the nearer end, as torch.lerp.
template <class W>
__device__ W lerp(W a, W b, W weight) {
  return weight < W(0.5) ? a + weight * (b - a) : b - (b - a) * (1 - weight);
}

template <class T, class StepSize>
__global__ void __launch_bounds__(kThreads) update(State<T> state, StepSize step_size) {
  using W = wide_t<T>;
  constexpr bool kRounds = sizeof(T) == 2;
  // The device's step size takes the time of a load: one thread computes it while all load.
  __shared__ W shared_size;
  __shared__ [[maybe_unused]] int64_t shared_seed;
  if (threadIdx.x == 0) {
    shared_size = static_cast<W>(step_size());
    if constexpr (kRounds) {
      shared_seed = step_size.seed();
    }
  }

  const int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool inside = e < state.entries.indices.cols;
  int64_t i = 0, j = 0;
  W p = 0, m = 0, g = 0;
  T old_v{};
  if (inside) {
    state.entries.load(e, i, j);
    p = static_cast<W>(state.param(i, j));
    if (state.keeps_first) {
      m = static_cast<W>(state.exp_avg(i, j));
    }
    old_v = state.exp_avg_sq(i, j);
    g = static_cast<W>(state.values[e * state.value_stride]);
  }
  __syncthreads();
  if (!inside) {
    return;
  }

  m = state.keeps_first ? lerp(m, g, state.weight1) : g;
  const W v = lerp(static_cast<W>(old_v), g * g, state.weight2);
  p -= shared_size * m / (sqrt(v) + state.eps);

  state.param(i, j) = static_cast<T>(p);
  if (state.keeps_first) {
    state.exp_avg(i, j) = static_cast<T>(m);
  }
  if constexpr (kRounds) {
    const int64_t place = i * state.exp_avg_sq.cols + j;
    state.exp_avg_sq(i, j) = round_stochastically(v, old_v, place, shared_seed);
  } else {
    state.exp_avg_sq(i, j) = v;
  }
}

struct Arguments {
  const Tensor& param;
  const std::optional<Tensor>& exp_avg;
  const Tensor &exp_avg_sq, &indices, &values;
  double beta1, beta2, eps;
};

void check(const Arguments& a) {
  check_matrix("param", a.param);
  const auto check_moment = [&](const char* name, const Tensor& t) {
    check_matrix(name, t);
    check_dtype(name, t, a.param.scalar_type());
    check_size(name, t.size(0), a.param.size(0));
    check_size(name, t.size(1), a.param.size(1));
    check_device(name, t, a.param);
  };
  check_moment("exp_avg_sq", a.exp_avg_sq);
  if (a.exp_avg) {
    check_moment("exp_avg", *a.exp_avg);
  } else {
    STD_TORCH_CHECK(a.beta1 == 0, "exp_avg may be None only where beta1 is 0");
  }
  check_matrix("indices", a.indices);
  check_dtype("indices", a.indices, ScalarType::Long);
  check_device("indices", a.indices, a.param);
  check_dtype("values", a.values, a.param.scalar_type());
  STD_TORCH_CHECK(a.values.dim() == 1, "values must have 1 dimension, got ", a.values.dim());
  check_device("values", a.values, a.param);
  check_size("indices", a.indices.size(0), 2);
  check_size("indices", a.indices.size(1), a.values.size(0));
}

template <class StepSize>
void run(const Arguments& a, const StepSize& step_size) {
  mark_written("param", a.param);
  if (a.exp_avg) {
    mark_written("exp_avg", *a.exp_avg);
  }
  mark_written("exp_avg_sq", a.exp_avg_sq);
  const int64_t k = a.values.size(0);
  if (k == 0) {
    return;
  }
  const DeviceGuard guard(a.param.get_device_index());
  const cudaStream_t stream = current_stream(a.param);
  dispatch_float(a.param.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const State<T> state{
        mutable_matrix<T>(a.param),
        mutable_matrix<T>(a.exp_avg ? *a.exp_avg : a.exp_avg_sq),
        mutable_matrix<T>(a.exp_avg_sq),
        a.exp_avg.has_value(),
        {matrix<int64_t>(a.indices), a.param.size(0), a.param.size(1)},
        static_cast<const T*>(a.values.const_data_ptr()),
        a.values.stride(0),
        static_cast<wide_t<T>>(1 - a.beta1),
        static_cast<wide_t<T>>(1 - a.beta2),
        static_cast<wide_t<T>>(a.eps)};
    update<<<num_blocks(k, kThreads), kThreads, 0, stream>>>(state, step_size);
    check_launch();
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
  const Arguments arguments{param, exp_avg, exp_avg_sq, indices, values, beta1, beta2, eps};
  check(arguments);
  const double bias1 = 1 - std::pow(beta1, step), bias2 = 1 - std::pow(beta2, step);
  run(arguments, HostStepSize{step, lr * std::sqrt(bias2) / bias1});
}

void sparse_adam_tensor_step_(
    const Tensor& param,
    const std::optional<Tensor>& exp_avg,
    const Tensor& exp_avg_sq,
    const Tensor& indices,
    const Tensor& values,
    const Tensor& step,
    const Tensor& lr,
    double beta1,
    double beta2,
    double eps) {
  const Arguments arguments{param, exp_avg, exp_avg_sq, indices, values, beta1, beta2, eps};
  check(arguments);
  const auto number = [&](const char* name, const Tensor& t, std::vector<ScalarType> dtypes) {
    check_device(name, t, param);
    check_size(name, t.numel(), 1);
    STD_TORCH_CHECK(
        std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) != dtypes.end(),
        name, " must not have dtype ", t.scalar_type());
    return Number{t.const_data_ptr(), t.scalar_type()};
  };
  using Type = ScalarType;
  const DeviceStepSize step_size{
      number("step", step, {Type::Float, Type::Int, Type::Long}),
      number("lr", lr, {Type::Float, Type::Double, Type::BFloat16, Type::Half}),
      std::log(beta1),
      std::log(beta2)};
  run(arguments, step_size);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("sparse_adam_", TORCH_BOX(&sparse_adam_));
  m.impl("_sparse_adam_tensor_step_", TORCH_BOX(&sparse_adam_tensor_step_));
}

}  // namespace sparsegrad
