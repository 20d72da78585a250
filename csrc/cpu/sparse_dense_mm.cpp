// C = A[rows][:, cols] @ B[cols, :], scattered into zeros (eq. 1).
//
// The product is torch's; only what is left out of it is ours. Columns are gathered where any is
// left out (they may meet Inf or NaN in B); rows where that costs less than multiplying the zeros.
#include "product.h"

namespace sparsegrad {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements copied that are worth a thread
constexpr int64_t kMacsPerCopy = 32;  // multiply-adds in the time of one element copied

template <class T>
void gather_rows(
    Matrix<const T> a,
    Matrix<T> out,
    const std::vector<int64_t>& rows,
    const std::vector<int64_t>& cols) {
  const bool all_rows = out.rows == a.rows, all_cols = out.cols == a.cols;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, out.cols));
  for_range(out.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = a.row(all_rows ? i : rows[i]);
      T* to = out.row(i);
      if (all_cols && a.col_stride == 1) {
        std::copy_n(from, out.cols, to);
      } else if (all_cols) {
        for (int64_t j = 0; j < out.cols; ++j) {
          to[j] = from[j * a.col_stride];
        }
      } else {
        for (int64_t j = 0; j < out.cols; ++j) {
          to[j] = from[cols[j] * a.col_stride];
        }
      }
    }
  });
}

// out[rows] = c, all else zero.
template <class T>
void scatter_rows(Matrix<const T> c, Matrix<T> out, const std::vector<int64_t>& rows) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, out.cols));
  for_range(out.rows, grain, [&](int64_t begin, int64_t end) {
    size_t r = std::lower_bound(rows.begin(), rows.end(), begin) - rows.begin();
    for (int64_t i = begin; i < end; ++i) {
      if (r < rows.size() && rows[r] == i) {
        std::copy_n(c.row(static_cast<int64_t>(r++)), out.cols, out.row(i));
      } else {
        std::fill_n(out.row(i), out.cols, T{0});
      }
    }
  });
}

// Rows of c that are not in `rows` become zero, in place.
template <class T>
void clear_rows(Matrix<T> c, const std::vector<int64_t>& rows) {
  size_t r = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    if (r < rows.size() && rows[r] == i) {
      ++r;
    } else {
      for (int64_t j = 0; j < c.cols; ++j) {
        c(i, j) = T{0};
      }
    }
  }
}

}  // namespace

Tensor gather(const Tensor& a, const std::vector<int64_t>& rows, const std::vector<int64_t>& cols) {
  const int64_t n_rows = static_cast<int64_t>(rows.size());
  const int64_t n_cols = static_cast<int64_t>(cols.size());
  if (n_rows == a.size(0) && n_cols == a.size(1)) {
    return a;
  }
  return dispatch_size(a.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const Matrix<const T> from = matrix<T>(a);
    if (from.row_stride < from.col_stride) {
      Tensor out = empty({n_cols, n_rows}, a.scalar_type());
      gather_rows(from.transposed(), mutable_matrix<T>(out), cols, rows);
      return torch::stable::transpose(out, 0, 1);
    }
    Tensor out = empty({n_rows, n_cols}, a.scalar_type());
    gather_rows(from, mutable_matrix<T>(out), rows, cols);
    return out;
  });
}

void check_product(const Tensor& a, const Tensor& b) {
  check_matrix("a", a);
  check_matrix("b", b);
  check_dtype("b", b, a.scalar_type());
  STD_TORCH_CHECK(
      a.size(1) == b.size(0),
      "b must have as many rows as a has columns, ", a.size(1), ", got ", b.size(0));
}

Tensor compacted_product(const Tensor& a, const Tensor& b, const RowsCols& kept) {
  const NoGrad no_grad;
  Tensor left = gather(a, kept.rows, kept.cols);
  if (static_cast<int64_t>(kept.cols.size()) == a.size(1)) {
    return mm(left, b);
  }
  std::vector<int64_t> all(b.size(1));
  return mm(left, gather(b, kept.cols, all));
}

Tensor product_of(const Tensor& a, const Tensor& b, double tol) {
  check_product(a, b);
  const NoGrad no_grad;
  const RowsCols kept = find_rows_cols(a, tol);
  const int64_t n_rows = static_cast<int64_t>(kept.rows.size());
  const int64_t left_out = a.size(0) - n_rows, c = a.size(1), d = b.size(1);
  const bool all_cols = static_cast<int64_t>(kept.cols.size()) == c;
  if (left_out == 0) {
    return compacted_product(a, b, kept);
  }
  return dispatch_size(a.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    if (all_cols && left_out * c * d < kMacsPerCopy * n_rows * (c + d)) {
      Tensor out = mm(a, b);
      clear_rows(mutable_matrix<T>(out), kept.rows);
      return out;
    }
    Tensor out = empty({a.size(0), d}, a.scalar_type());
    const Tensor product = n_rows == 0 ? out : torch::stable::contiguous(compacted_product(a, b, kept));
    scatter_rows(matrix<T>(product), mutable_matrix<T>(out), kept.rows);
    return out;
  });
}

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("sparse_dense_mm", TORCH_BOX(&product_of));
}

}  // namespace sparsegrad
