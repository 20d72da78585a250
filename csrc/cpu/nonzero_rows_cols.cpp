// rows = {i : any_j |a_ij| > tol},  cols = {j : any_i |a_ij| > tol}
//
// One pass that stops early. A row is settled by its first nonzero. From there on it is read only
// while columns are open, and only at the open columns once they are few.
#include "rows_cols.h"

#include <atomic>

namespace sparsegrad {
namespace {

constexpr int64_t kBlock = 64;

// |a| > tol, NaN included: magnitudes compare as integers, and NaN's bits are above infinity's.
template <class Key>
struct Above {
  Key limit;
  SPARSEGRAD_INLINE bool operator()(Key bits) const {
    return magnitude(bits) > limit;
  }
};

// The first j in [0, n) where row[j * stride] is above, else n.
template <class Key>
SPARSEGRAD_INLINE inline int64_t first_above(
    const Key* row, int64_t n, int64_t stride, Above<Key> above) {
  int64_t j = 0;
  if (stride == 1) {
    for (; j + kBlock <= n; j += kBlock) {
      Key largest = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        largest = std::max(largest, magnitude(row[j + i]));
      }
      if (largest > above.limit) {
        break;
      }
    }
  }
  while (j < n && !above(row[j * stride])) {
    ++j;
  }
  return j;
}

// The columns one thread has seen something in.
class Columns {
 public:
  explicit Columns(int64_t n) : flags_(n), open_(n) {}

  bool all_settled() const {
    return open_ == 0;
  }

  // A row whose first nonzero is in column `first`.
  template <class Key>
  SPARSEGRAD_INLINE void add(const Key* row, int64_t first, int64_t stride, Above<Key> above) {
    if (listed_) {
      std::erase_if(list_, [&](int64_t j) {
        flags_[j] = above(row[j * stride]);
        return flags_[j];
      });
      open_ = static_cast<int64_t>(list_.size());
      return;
    }
    const int64_t n = static_cast<int64_t>(flags_.size());
    uint8_t* flags = flags_.data();
    if (stride == 1) {
      for (int64_t j = first; j < n; ++j) {
        flags[j] |= above(row[j]);
      }
    } else {
      for (int64_t j = first; j < n; ++j) {
        flags[j] |= above(row[j * stride]);
      }
    }
    open_ = std::count(flags_.begin(), flags_.end(), 0);
    if (open_ <= n / 32) {
      list();
    }
  }

  void merge_into(std::vector<uint8_t>& all) const {
    for (size_t j = 0; j < all.size(); ++j) {
      all[j] |= flags_[j];
    }
  }

 private:
  void list() {
    listed_ = true;
    for (size_t j = 0; j < flags_.size(); ++j) {
      if (!flags_[j]) {
        list_.push_back(static_cast<int64_t>(j));
      }
    }
  }

  std::vector<uint8_t> flags_;
  std::vector<int64_t> list_;
  int64_t open_;
  bool listed_ = false;
};

struct Flags {
  std::vector<uint8_t> rows, cols;
};

// Threads take blocks of rows as they get done: a row of zeros costs far more than another.
template <class Key>
Flags scan(Matrix<const Key> a, Above<Key> above) {
  Flags flags{std::vector<uint8_t>(a.rows), std::vector<uint8_t>(a.cols)};
  const int64_t n_threads = num_chunks(a.rows * a.cols, 1 << 16);
  const int64_t step = std::max<int64_t>(1, a.rows / (16 * n_threads));
  std::vector<Columns> columns(n_threads, Columns(a.cols));
  std::atomic<int64_t> next{0};
  for_chunks(n_threads, [&](int64_t thread) {
    Columns& mine = columns[thread];
    simd([&]() SPARSEGRAD_INLINE {
      for (int64_t begin; (begin = next.fetch_add(step)) < a.rows;) {
        for (int64_t i = begin; i < std::min(begin + step, a.rows); ++i) {
          const int64_t first = first_above(a.row(i), a.cols, a.col_stride, above);
          flags.rows[i] = first < a.cols;
          if (first < a.cols && !mine.all_settled()) {
            mine.add(a.row(i), first, a.col_stride, above);
          }
        }
      }
    });
  });
  for (const Columns& part : columns) {
    part.merge_into(flags.cols);
  }
  return flags;
}

// Indices of the set flags of an axis of n; where one flag stands for all (stride 0), of all.
std::vector<int64_t> positions(const std::vector<uint8_t>& flags, int64_t n) {
  std::vector<int64_t> out;
  const bool repeated = static_cast<int64_t>(flags.size()) < n;
  out.reserve(repeated ? n : std::count(flags.begin(), flags.end(), 1));
  for (int64_t i = 0; i < n; ++i) {
    if (flags[repeated ? 0 : i]) {
      out.push_back(i);
    }
  }
  return out;
}

Tensor to_tensor(const std::vector<int64_t>& values) {
  Tensor out = empty({static_cast<int64_t>(values.size())}, ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor> nonzero_rows_cols(const Tensor& a, double tol) {
  const RowsCols found = find_rows_cols(a, tol);
  return {to_tensor(found.rows), to_tensor(found.cols)};
}

}  // namespace

RowsCols find_rows_cols(const Tensor& a, double tol) {
  check_matrix("a", a);
  return dispatch_float(a.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using Key = bits_t<T>;
    Matrix<const Key> m = matrix<Key>(a);
    // Rows (columns) that share their memory are one.
    m.rows = m.row_stride == 0 ? std::min<int64_t>(m.rows, 1) : m.rows;
    m.cols = m.col_stride == 0 ? std::min<int64_t>(m.cols, 1) : m.cols;
    // Memory is walked along its shorter stride.
    const bool swap = m.rows > 1 && m.cols > 1 && m.row_stride < m.col_stride;
    const Above<Key> above{magnitude(std::bit_cast<Key>(static_cast<T>(tol)))};
    Flags flags = scan(swap ? m.transposed() : m, above);
    if (swap) {
      std::swap(flags.rows, flags.cols);
    }
    return RowsCols{positions(flags.rows, a.size(0)), positions(flags.cols, a.size(1))};
  });
}

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("nonzero_rows_cols", TORCH_BOX(&nonzero_rows_cols));
}

}  // namespace sparsegrad
