// W += V^T D U  for sparse D with nonzero rows R and columns C (design 2.2).
//
// (V^T D) U  costs  n out + |C| in out  multiply-adds,  V^T (D U)  n in + |R| in out.
// Either way the sparse factor is multiplied first, into the side it shrinks; then the dense
// product of the two sides is added to W. Without U or V, the identity, that factor is added at
// once; without both, the entries.
//
// Entries are sorted first, so sums have one order and bits do not vary. |C| and |R| are known on
// the device only: the way is chosen by what they are at most.
#include "add_product.cuh"
#include "sparse_factor.cuh"

namespace sparsegrad {
namespace {

// ---- Without a basis ----

// The first of the entries for an element of W adds all of them.
template <class T, class Round>
__global__ void add_entries(
    Matrix<T> weight, const int64_t* __restrict__ keys, const int32_t* __restrict__ positions,
    const T* __restrict__ values, int64_t value_stride, int32_t n, Round round) {
  const int64_t first = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (first >= n || (first > 0 && keys[first] == keys[first - 1])) {
    return;
  }
  const int64_t row = keys[first] / weight.cols, col = keys[first] % weight.cols;
  wide_t<T> sum = static_cast<wide_t<T>>(weight(row, col));
  for (int64_t e = first; e < n && keys[e] == keys[first]; ++e) {
    sum += static_cast<wide_t<T>>(values[positions[e] * value_stride]);
  }
  weight(row, col) = round(sum, weight(row, col), keys[first]);
}

// ---- Groups of entries ----

// D's entries by one axis, in groups of equal outer index, and room for at most `max_groups` groups.
struct GroupedEntries {
  SortedEntries entries;
  int64_t max_groups;
  Tensor room;
  Groups groups;
};

GroupedEntries group_entries(
    const Tensor& like, const Entries& d, bool by_cols, int parts, cudaStream_t stream) {
  const int64_t n = d.indices.cols, outer = by_cols ? d.cols : d.rows;
  const int64_t max_groups = std::min(outer, n);
  const Tensor room = empty_on(like, (parts + 1) * max_groups + 2, ScalarType::Int);
  int32_t* const ints = static_cast<int32_t*>(room.mutable_data_ptr());
  const Groups groups{
      ints, ints + parts * max_groups, ints + (parts + 1) * max_groups + 1, parts};
  const SortedEntries entries = sort_entries(like, d, by_cols, stream);
  find_groups<<<1, kScanThreads, 0, stream>>>(
      entries.key(), static_cast<int32_t>(n), outer, by_cols ? d.rows : d.cols, groups);
  check_launch();
  return {entries, max_groups, room, groups};
}

// ---- With one basis ----

// W += D basis, or `by_cols` of transposes: W^T += D^T basis.
template <class T, class Round>
void fold_one_side(
    const Tensor& weight, const Tensor& basis, bool by_cols, Matrix<const int64_t> indices,
    const T* values, int64_t value_stride, const Round& round, cudaStream_t stream) {
  const Entries d{
      indices, by_cols ? basis.size(0) : weight.size(0), by_cols ? weight.size(1) : basis.size(0)};
  const GroupedEntries grouped = group_entries(weight, d, by_cols, 1, stream);
  const auto from =
      sparse_times_of<T>(grouped.groups, grouped.entries, values, value_stride, basis);
  const Matrix<T> to = mutable_matrix<T>(weight);
  if (by_cols) {
    launch_add_columns(from, grouped.max_groups, to, round, stream);
  } else {
    launch_sparse_times(from, grouped.max_groups, AddRow<T, Round>{to, round}, stream);
  }
}

// ---- The dense product ----

template <class T, class Round>
void fold_in_basis(
    const Tensor& weight, const Tensor& u, const Tensor& v, Matrix<const int64_t> indices,
    const T* values, int64_t value_stride, const Round& round, cudaStream_t stream) {
  const int64_t n_out = weight.size(0), n_in = weight.size(1), n = indices.cols;
  const int64_t max_cols = std::min(u.size(0), n), max_rows = std::min(v.size(0), n);
  const bool left_first = n * n_out + max_cols * n_in * n_out <= n * n_in + max_rows * n_in * n_out;

  // D's axis that is kept, and the basis of its other axis, by which it is multiplied.
  const Tensor &kept_basis = left_first ? u : v, &basis = left_first ? v : u;
  constexpr int kParts = Round::kParts;
  const GroupedEntries grouped =
      group_entries(weight, {indices, v.size(0), u.size(0)}, left_first, kParts, stream);
  const Groups& groups = grouped.groups;

  // [parts * groups, width], its rows padded to 16 bytes
  const int64_t width = basis.size(1), pitch = (width + 7) / 8 * 8;
  Tensor factor = empty_on(weight, kParts * grouped.max_groups, pitch, weight.scalar_type());
  factor = torch::stable::narrow(factor, 1, 0, width);
  launch_sparse_times(
      sparse_times_of<T>(groups, grouped.entries, values, value_stride, basis),
      grouped.max_groups, StoreParts<T>{static_cast<T*>(factor.mutable_data_ptr()), pitch, kParts},
      stream);

  const Operand<T> made = operand<T>(factor, 1, false), kept = operand<T>(kept_basis, 1, true);
  add_product<T>(
      weight,
      Product<T>{
          .a = left_first ? made : kept,
          .b = left_first ? kept : made,
          .depth_size = static_cast<int32_t>(kParts * kept_basis.size(0)),
          .depths = groups.kept,
          .n_depths = groups.count,
          .tf32 = allows_tf32(weight.scalar_type())},
      round);
}

// ---- The operators ----

void check_fold(
    const Tensor& weight, const std::optional<Tensor>& u, const std::optional<Tensor>& v,
    const Tensor& indices, const Tensor& values) {
  check_sizes("weight", weight);
  check_matrix("indices", indices);
  check_dtype("indices", indices, ScalarType::Long);
  check_device("indices", indices, weight);
  check_dtype("values", values, weight.scalar_type());
  check_device("values", values, weight);
  STD_TORCH_CHECK(values.dim() == 1, "values must have 1 dimension, got ", values.dim());
  STD_TORCH_CHECK(values.size(0) < int64_t{1} << 31, "values must be fewer than 2^31");
  check_size("indices", indices.size(0), 2);
  check_size("indices", indices.size(1), values.size(0));
  const std::tuple<const char*, const std::optional<Tensor>&, int64_t> bases[] = {
      {"u", u, weight.size(1)}, {"v", v, weight.size(0)}};
  for (const auto& [name, basis, size] : bases) {
    if (basis.has_value()) {
      check_sizes(name, *basis);
      check_dtype(name, *basis, weight.scalar_type());
      check_device(name, *basis, weight);
      check_size(name, basis->size(1), size);
    }
  }
}

template <class T, class Round>
void fold(
    const Tensor& weight, const std::optional<Tensor>& u, const std::optional<Tensor>& v,
    const Tensor& indices, const Tensor& values, const Round& round) {
  const cudaStream_t stream = current_stream(weight);
  const Matrix<const int64_t> entries = matrix<int64_t>(indices);
  const T* data = static_cast<const T*>(values.const_data_ptr());
  const int64_t stride = values.stride(0);
  if (u.has_value() && v.has_value()) {
    return fold_in_basis<T>(weight, *u, *v, entries, data, stride, round, stream);
  }
  if (u.has_value() || v.has_value()) {
    return fold_one_side<T>(
        weight, u ? *u : *v, !u.has_value(), entries, data, stride, round, stream);
  }
  const SortedEntries sorted =
      sort_entries(weight, {entries, weight.size(0), weight.size(1)}, false, stream);
  add_entries<T><<<num_blocks(entries.cols, kEntryThreads), kEntryThreads, 0, stream>>>(
      mutable_matrix<T>(weight), sorted.key(), sorted.position(), data, stride,
      static_cast<int32_t>(entries.cols), round);
  check_launch();
}

void fold_(
    const Tensor& weight, const std::optional<Tensor>& u, const std::optional<Tensor>& v,
    const Tensor& indices, const Tensor& values) {
  check_fold(weight, u, v, indices, values);
  mark_written("weight", weight);
  if (values.size(0) == 0 || weight.numel() == 0) {
    return;
  }
  const DeviceGuard on_device(weight.get_device_index());
  const NoGrad no_grad;
  dispatch_float(weight.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    fold<T>(weight, u, v, indices, values, RoundNearest<T>{});
  });
}

// fold_, with W rounded up or down by chance.
void fold_stochastic_(
    const Tensor& weight, const std::optional<Tensor>& u, const std::optional<Tensor>& v,
    const Tensor& indices, const Tensor& values, const Tensor& seed) {
  check_fold(weight, u, v, indices, values);
  STD_TORCH_CHECK(
      weight.element_size() == 2, "with a seed, weight must be bfloat16 or float16, got ",
      weight.scalar_type());
  check_dtype("seed", seed, ScalarType::Long);
  check_size("seed", seed.numel(), 1);
  check_device("seed", seed, weight);
  mark_written("weight", weight);
  if (values.size(0) == 0 || weight.numel() == 0) {
    return;
  }
  const DeviceGuard on_device(weight.get_device_index());
  const NoGrad no_grad;
  const int64_t* const bits = static_cast<const int64_t*>(seed.const_data_ptr());
  if (weight.scalar_type() == ScalarType::BFloat16) {
    fold<BFloat16>(weight, u, v, indices, values, RoundStochastic<BFloat16>{bits});
  } else {
    fold<Half>(weight, u, v, indices, values, RoundStochastic<Half>{bits});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CUDA, m) {
  m.impl("fold_", TORCH_BOX(&fold_));
  m.impl("_fold_stochastic_", TORCH_BOX(&fold_stochastic_));
}

}  // namespace sparsegrad
