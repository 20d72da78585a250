// W += V^T D U  for sparse D with nonzero rows R and columns C (design 2.2).
//
// (V^T D) U  costs  n out + |C| in out  multiply-adds,  V^T (D U)  n in + |R| in out.
// Either way the sparse factor is multiplied here, into the side it shrinks, and torch adds the
// dense product of the two sides. Without U or V, the identity, that factor is added to W at once;
// without both, the entries.
#include "../common.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace sparsegrad {
namespace {

constexpr int64_t kPanel = 64;       // columns multiplied at a time, in registers
constexpr int64_t kTogether = 4;     // panels copied together
constexpr int64_t kRows = 16;        // rows of a product stored together: a cache line of columns
constexpr int64_t kGrain = 1 << 14;  // entries worth a thread

// ---- Without a basis ----

template <class T, class Value>
void add_entry(T& to, Value value) {
  to = static_cast<T>(static_cast<wide_t<T>>(to) + static_cast<wide_t<T>>(value));
}

// Threads own whole rows where the entries come in order of rows; each adds in the order given.
template <class T>
void add_entries(
    Matrix<T> weight, Matrix<const int64_t> indices, const T* values, int64_t value_stride) {
  const int64_t n = indices.cols;
  bool in_order = true;
  for (int64_t e = 1; e < n; ++e) {
    in_order &= indices(0, e - 1) <= indices(0, e);
  }
  const int64_t chunks = in_order ? num_chunks(n, kGrain) : 1;
  const auto first_of_row = [&](int64_t e) {
    while (0 < e && e < n && indices(0, e) == indices(0, e - 1)) {
      ++e;
    }
    return e;
  };
  for_chunks(chunks, [&](int64_t c) {
    const int64_t end = first_of_row(n * (c + 1) / chunks);
    for (int64_t e = first_of_row(n * c / chunks); e < end; ++e) {
      add_entry(weight(indices(0, e), indices(1, e)), values[e * value_stride]);
    }
  });
}

// ---- With a basis ----

// An axis of D: its indices that hold an entry, and their positions among those.
struct Axis {
  std::vector<int64_t> kept, position;

  Axis(Matrix<const int64_t> indices, int64_t which, int64_t n) : position(n) {
    for (int64_t e = 0; e < indices.cols; ++e) {
      position[indices(which, e)] = 1;
    }
    for (int64_t i = 0; i < n; ++i) {
      if (position[i]) {
        position[i] = size();
        kept.push_back(i);
      }
    }
  }
  int64_t size() const {
    return static_cast<int64_t>(kept.size());
  }
};

// Entries of D grouped by `outer`, in the order given within a group.
template <class W>
struct Grouped {
  std::vector<int64_t> begins, inner;
  std::vector<W> values;

  template <class T>
  Grouped(
      Matrix<const int64_t> indices, const T* given, int64_t stride, int64_t outer_axis,
      const Axis& outer, const Axis& inner_axis)
      : begins(outer.size() + 1), inner(indices.cols), values(indices.cols) {
    for (int64_t e = 0; e < indices.cols; ++e) {
      ++begins[outer.position[indices(outer_axis, e)] + 1];
    }
    for (int64_t o = 0; o < outer.size(); ++o) {
      begins[o + 1] += begins[o];
    }
    std::vector<int64_t> next(begins);
    for (int64_t e = 0; e < indices.cols; ++e) {
      const int64_t at = next[outer.position[indices(outer_axis, e)]]++;
      inner[at] = inner_axis.position[indices(1 - outer_axis, e)];
      values[at] = static_cast<W>(given[e * stride]);
    }
  }
};

// n elements of any stride, converted.
template <class W, class T>
void copy_run(const T* from, int64_t n, int64_t stride, W* to) {
  if (stride == 1 && std::is_same_v<W, T>) {
    std::memcpy(to, from, n * sizeof(T));
  } else if (stride == 1) {
    std::transform(from, from + n, to, [](T value) { return static_cast<W>(value); });
  } else {
    for (int64_t j = 0; j < n; ++j) {
      to[j] = static_cast<W>(from[j * stride]);
    }
  }
}

// Written out, since gcc would rather unroll the loop over entries into a loop over columns than use
// vectors for it. 32 bytes, for what is wider than a register it takes apart in memory.
template <class W>
struct Vector {
  typedef W type __attribute__((vector_size(32)));
};

// sum = the entries [begin, end) of D times their rows of the panel.
template <class W>
SPARSEGRAD_INLINE inline void add_group(
    const Grouped<W>& d, int64_t begin, int64_t end, const W* panel, W* sum) {
  using V = typename Vector<W>::type;
  constexpr int64_t kVectors = kPanel * sizeof(W) / sizeof(V);
  V total[kVectors] = {};
  for (int64_t e = begin; e < end; ++e) {
    const W* row = panel + d.inner[e] * kPanel;
    for (int64_t j = 0; j < kVectors; ++j) {
      V part;
      std::memcpy(&part, row + j * (kPanel / kVectors), sizeof(part));
      total[j] += d.values[e] * part;
    }
  }
  std::memcpy(sum, total, sizeof(total));
}

// A part of a product: so many rows from row `row` on, and columns.
template <class W>
struct Part {
  int64_t row, rows, col, cols;
  W values[kRows][kPanel];
};

// Calls `store` with each part of the product whose row o is the sum of value * b[kept[inner]] over
// the entries of group o. A few panels of columns are copied together (b is read in longer pieces),
// then multiplied one by one, each from the cache.
template <class W, class T, class Store>
void sparse_times(
    const Grouped<W>& d, Matrix<const T> b, const std::vector<int64_t>& kept, const Store& store) {
  const int64_t n_groups = static_cast<int64_t>(d.begins.size()) - 1;
  const int64_t n_kept = static_cast<int64_t>(kept.size());
  const int64_t n_panels = (b.cols + kPanel - 1) / kPanel;
  for_range(n_panels, 1, [&](int64_t first_panel, int64_t last_panel) {
    const int64_t together = std::min(kTogether, last_panel - first_panel);
    std::vector<W> panels(together * n_kept * kPanel);
    for (int64_t first = first_panel; first < last_panel; first += together) {
      const int64_t begin = first * kPanel;
      const int64_t end = std::min(std::min(first + together, last_panel) * kPanel, b.cols);
      for (int64_t i = 0; i < n_kept; ++i) {
        for (int64_t j = begin; j < end; j += kPanel) {
          W* to = panels.data() + (j - begin) * n_kept + i * kPanel;
          copy_run(&b(kept[i], j), std::min(kPanel, end - j), b.col_stride, to);
        }
      }
      for (int64_t j = begin; j < end; j += kPanel) {
        const W* panel = panels.data() + (j - begin) * n_kept;
        simd([&]() SPARSEGRAD_INLINE {
          Part<W> part;
          part.col = j;
          part.cols = std::min(kPanel, end - j);
          for (part.row = 0; part.row < n_groups; part.row += kRows) {
            part.rows = std::min(kRows, n_groups - part.row);
            for (int64_t i = 0; i < part.rows; ++i) {
              const int64_t o = part.row + i;
              add_group(d, d.begins[o], d.begins[o + 1], panel, part.values[i]);
            }
            store(part);
          }
        });
      }
    }
  });
}

// basis[kept] in the wide dtype.
template <class W, class T>
Tensor gather_rows(const Tensor& basis, const std::vector<int64_t>& kept, ScalarType wide) {
  const int64_t n = static_cast<int64_t>(kept.size());
  if (std::is_same_v<W, T> && n == basis.size(0)) {
    return basis;
  }
  const Matrix<const T> from = matrix<T>(basis);
  Tensor out = empty({n, from.cols}, wide);
  const Matrix<W> to = mutable_matrix<W>(out);
  for_range(n, std::max<int64_t>(1, kGrain / from.cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      copy_run(from.row(kept[i]), from.cols, from.col_stride, to.row(i));
    }
  });
  return out;
}

void add_product(const Tensor& to, const Tensor& left, const Tensor& right) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1.0, 1.0));
}

template <class W>
auto copy_to(Matrix<W> out) {
  return [out](const Part<W>& part) SPARSEGRAD_INLINE {
    for (int64_t i = 0; i < part.rows; ++i) {
      std::copy_n(part.values[i], part.cols, &out(part.row + i, part.col));
    }
  };
}

// W += D basis, or of transposes where `outer_axis` is 1: W^T += D^T basis.
template <class T>
void fold_one_side(
    Matrix<T> weight, const Tensor& basis, Matrix<const int64_t> indices, const T* values,
    int64_t value_stride, int64_t outer_axis) {
  using W = wide_t<T>;
  const Matrix<T> to = outer_axis == 0 ? weight : weight.transposed();
  const Axis outer(indices, outer_axis, to.rows), inner(indices, 1 - outer_axis, basis.size(0));
  const Grouped<W> d(indices, values, value_stride, outer_axis, outer, inner);
  const auto by_rows = [&](const Part<W>& part) SPARSEGRAD_INLINE {
    for (int64_t i = 0; i < part.rows; ++i) {
      T* const at = &to(outer.kept[part.row + i], part.col);
      for (int64_t j = 0; j < part.cols; ++j) {
        add_entry(at[j], part.values[i][j]);
      }
    }
  };
  const auto by_cols = [&](const Part<W>& part) SPARSEGRAD_INLINE {
    const int64_t* const kept = outer.kept.data() + part.row;
    for (int64_t j = 0; j < part.cols; ++j) {
      T* const at = &to(0, part.col + j);
      for (int64_t i = 0; i < part.rows; ++i) {
        add_entry(at[kept[i] * to.row_stride], part.values[i][j]);
      }
    }
  };
  if (to.col_stride == 1) {
    sparse_times(d, matrix<T>(basis), inner.kept, by_rows);
  } else {
    sparse_times(d, matrix<T>(basis), inner.kept, by_cols);
  }
}

template <class T>
void fold(
    const Tensor& weight, const Tensor& u, const Tensor& v, Matrix<const int64_t> indices,
    const T* values, int64_t value_stride) {
  using W = wide_t<T>;
  const ScalarType wide = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t n_out = weight.size(0), n_in = weight.size(1), n = indices.cols;
  const Axis rows(indices, 0, v.size(0)), cols(indices, 1, u.size(0));

  const int64_t left_first = n * n_out + cols.size() * n_in * n_out;
  const int64_t right_first = n * n_in + rows.size() * n_in * n_out;
  Tensor left, right;  // W += left^T right
  if (left_first <= right_first) {
    const Grouped<W> d(indices, values, value_stride, 1, cols, rows);
    left = empty({cols.size(), n_out}, wide);
    sparse_times(d, matrix<T>(v), rows.kept, copy_to(mutable_matrix<W>(left)));
    right = gather_rows<W, T>(u, cols.kept, wide);
  } else {
    const Grouped<W> d(indices, values, value_stride, 0, rows, cols);
    right = empty({rows.size(), n_in}, wide);
    sparse_times(d, matrix<T>(u), cols.kept, copy_to(mutable_matrix<W>(right)));
    left = gather_rows<W, T>(v, rows.kept, wide);
  }
  left = torch::stable::transpose(left, 0, 1);
  if (std::is_same_v<W, T>) {
    return add_product(weight, left, right);
  }
  const Tensor sum = torch::stable::to(weight, wide);
  add_product(sum, left, right);
  Tensor target = weight;
  torch::stable::copy_(target, sum);
}

void fold_(
    const Tensor& weight, const std::optional<Tensor>& u, const std::optional<Tensor>& v,
    const Tensor& indices, const Tensor& values) {
  check_matrix("weight", weight);
  check_matrix("indices", indices);
  check_dtype("indices", indices, ScalarType::Long);
  check_dtype("values", values, weight.scalar_type());
  STD_TORCH_CHECK(values.dim() == 1, "values must have 1 dimension, got ", values.dim());
  check_size("indices", indices.size(0), 2);
  check_size("indices", indices.size(1), values.size(0));
  if (u.has_value()) {
    check_matrix("u", *u);
    check_dtype("u", *u, weight.scalar_type());
    check_size("u", u->size(1), weight.size(1));
  }
  if (v.has_value()) {
    check_matrix("v", *v);
    check_dtype("v", *v, weight.scalar_type());
    check_size("v", v->size(1), weight.size(0));
  }
  const Matrix<const int64_t> entries = matrix<int64_t>(indices);
  check_indices(
      entries, v.has_value() ? v->size(0) : weight.size(0),
      u.has_value() ? u->size(0) : weight.size(1));
  mark_written("weight", weight);
  if (entries.cols == 0 || weight.numel() == 0) {
    return;
  }
  const NoGrad no_grad;
  dispatch_float(weight.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const T* data = static_cast<const T*>(values.const_data_ptr());
    const int64_t stride = values.stride(0);
    if (u.has_value() && v.has_value()) {
      fold<T>(weight, *u, *v, entries, data, stride);
    } else if (u.has_value() || v.has_value()) {
      fold_one_side(mutable_matrix<T>(weight), u ? *u : *v, entries, data, stride, u ? 0 : 1);
    } else {
      add_entries(mutable_matrix<T>(weight), entries, data, stride);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("fold_", TORCH_BOX(&fold_));
}

}  // namespace sparsegrad
