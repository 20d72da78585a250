// indices [2, n] and values [n] of a matrix's entries that are not zero, which are set to zero.
//
// Nearly all are zero: 32 of them are looked at together, and in one pass over the matrix.
#include "../common.h"

namespace sparsegrad {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements worth a thread
constexpr int64_t kBlock = 32;       // the bits of a word

// Appends `first` + i for each of n elements that is not zero.
template <class Key>
void find_entries(const Key* bits, int64_t n, int64_t first, std::vector<int64_t>& found) {
  simd([&]() SPARSEGRAD_INLINE {
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock) {
      uint32_t held = 0;
      for (int64_t j = 0; j < kBlock; ++j) {
        held |= static_cast<uint32_t>(magnitude(bits[i + j]) != 0) << j;
      }
      for (; held != 0; held &= held - 1) {
        found.push_back(first + i + std::countr_zero(held));
      }
    }
    for (; i < n; ++i) {
      if (magnitude(bits[i]) != 0) {
        found.push_back(first + i);
      }
    }
  });
}

// Of rows [begin, end), as row-major indices, ascending.
template <class Key>
std::vector<int64_t> entries_of_rows(const Matrix<Key>& m, int64_t begin, int64_t end) {
  std::vector<int64_t> found;
  if (m.contiguous()) {
    find_entries(m.row(begin), (end - begin) * m.cols, begin * m.cols, found);
  } else if (m.col_stride == 1) {
    for (int64_t i = begin; i < end; ++i) {
      find_entries(m.row(i), m.cols, i * m.cols, found);
    }
  } else {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) {
        if (magnitude(m(i, j)) != 0) {
          found.push_back(i * m.cols + j);
        }
      }
    }
  }
  return found;
}

std::tuple<Tensor, Tensor> take_entries_(const Tensor& delta) {
  check_matrix("delta", delta);
  mark_written("delta", delta);
  return dispatch_bits(delta.scalar_type(), [&](auto t, auto) {
    using Key = typename decltype(t)::type;
    const Matrix<Key> m = mutable_matrix<Key>(delta);
    const int64_t n_parts =
        std::max<int64_t>(1, std::min(m.rows, num_chunks(m.rows * m.cols, kGrain)));
    std::vector<std::vector<int64_t>> parts(n_parts);
    for_chunks(n_parts, [&](int64_t p) {
      parts[p] = entries_of_rows(m, m.rows * p / n_parts, m.rows * (p + 1) / n_parts);
    });
    std::vector<int64_t> begins{0};
    for (const auto& part : parts) {
      begins.push_back(begins.back() + static_cast<int64_t>(part.size()));
    }

    const int64_t n = begins.back();
    Tensor indices = empty({2, n}, ScalarType::Long), values = empty({n}, delta.scalar_type());
    int64_t* const rows = static_cast<int64_t*>(indices.mutable_data_ptr());
    Key* const out = static_cast<Key*>(values.mutable_data_ptr());
    for_chunks(n_parts, [&](int64_t p) {
      int64_t at = begins[p], row = 0, row_end = 0;
      for (const int64_t linear : parts[p]) {
        if (linear >= row_end) {
          row = linear / m.cols;
          row_end = (row + 1) * m.cols;
        }
        const int64_t col = linear - (row_end - m.cols);
        rows[at] = row;
        rows[n + at] = col;
        out[at] = std::exchange(m(row, col), Key{0});
        ++at;
      }
    });
    return std::tuple{indices, values};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("_take_entries_", TORCH_BOX(&take_entries_));
}

}  // namespace sparsegrad
