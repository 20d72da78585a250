// The k entries of largest magnitude, exact: of equal ones the lowest linear index, NaN on top.
//
// A sample gives a lower bound of the k-th largest magnitude that a little more than k entries
// are likely to reach. One pass over the matrix collects those, in row-major order, and the exact
// k-th largest is found among them. Should fewer than k reach it, the pass is made again from a
// bound of zero that rises as it goes on.
#include "topk.h"

namespace sparsegrad {
namespace {

constexpr int64_t kGrain = 1 << 15;   // elements worth a thread
constexpr int64_t kSamples = 1024;    // places sampled, one cache line of 16 elements each
constexpr int64_t kSampleRun = 16;
constexpr int64_t kTile = 16;         // rows transposed together: a cache line

// A rank that about k of the matrix's entries, and rather more than fewer, are likely to reach.
template <class Key>
Key sampled_bound(Matrix<const Key> c, int64_t k, Key infinity) {
  const int64_t n = c.rows * c.cols, stride = n / kSamples;
  const double share = static_cast<double>(k) / n;
  const double expected = share * kSamples * kSampleRun;
  const int64_t wanted = static_cast<int64_t>(expected + 8 * std::sqrt(expected) + 8);
  if (stride < 2 * kSampleRun || wanted > kSamples * kSampleRun / 4) {
    return 0;
  }
  std::vector<Key> sample;
  sample.reserve(kSamples * kSampleRun);
  uint64_t random = 1;
  for (int64_t s = 0; s < kSamples; ++s) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const int64_t first = s * stride + static_cast<int64_t>((random >> 33) % (stride - kSampleRun));
    int64_t i = first / c.cols, j = first % c.cols;
    for (int64_t r = 0; r < kSampleRun; ++r) {
      sample.push_back(c(i, j));
      if (++j == c.cols) {
        j = 0;
        ++i;
      }
    }
  }
  return kth_largest<Key>({{sample.data(), kSamples * kSampleRun}}, wanted, infinity).rank;
}

// Rows [begin, end) of c to a contiguous buffer; memory is walked along its shorter stride.
template <class Key>
void copy_rows(Matrix<const Key> c, int64_t begin, int64_t end, Key* out) {
  if (c.row_stride < c.col_stride) {
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int64_t stop = std::min(tile + kTile, end);
      for (int64_t j = 0; j < c.cols; ++j) {
        for (int64_t i = tile; i < stop; ++i) {
          out[(i - begin) * c.cols + j] = c(i, j);
        }
      }
    }
  } else {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < c.cols; ++j) {
        *out++ = c(i, j);
      }
    }
  }
}

// Calls take(bits, n, linear index of the first) for rows [begin, end), in row-major order.
template <class Key, class F>
void for_rows(Matrix<const Key> c, int64_t begin, int64_t end, const F& take) {
  if (c.contiguous()) {
    return take(c.row(begin), (end - begin) * c.cols, begin * c.cols);
  }
  if (c.col_stride == 1 && c.cols >= 1024) {
    for (int64_t i = begin; i < end; ++i) {
      take(c.row(i), c.cols, i * c.cols);
    }
    return;
  }
  const int64_t step = std::clamp<int64_t>((1 << 17) / c.cols, 1, 1 << 12);
  std::vector<Key> buffer(std::min(step, end - begin) * c.cols);
  for (int64_t i = begin; i < end; i += step) {
    const int64_t stop = std::min(i + step, end);
    copy_rows(c, i, stop, buffer.data());
    take(buffer.data(), (stop - i) * c.cols, i * c.cols);
  }
}

template <class Key>
std::vector<Candidates<Key>> collect(
    Matrix<const Key> c, int64_t k, Key infinity, Key lower) {
  const int64_t n_parts = std::min(c.rows, num_chunks(c.rows * c.cols, kGrain));
  std::vector<Candidates<Key>> parts;
  for (int64_t p = 0; p < n_parts; ++p) {
    parts.emplace_back(k, infinity, lower, c.rows * c.cols / n_parts);
  }
  for_chunks(n_parts, [&](int64_t p) {
    for_rows(
        c, c.rows * p / n_parts, c.rows * (p + 1) / n_parts,
        [&](const Key* bits, int64_t n, int64_t first) { parts[p].add(bits, n, first); });
  });
  return parts;
}

// All entries, in row-major order.
template <class Key>
std::tuple<Tensor, Tensor> everything(Matrix<const Key> c, ScalarType dtype) {
  const int64_t n = c.rows * c.cols;
  Tensor indices = empty({2, n}, ScalarType::Long), values = empty({n}, dtype);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  Key* out = static_cast<Key*>(values.mutable_data_ptr());
  const int64_t grain = c.cols == 0 ? 1 : std::max<int64_t>(1, kGrain / c.cols);
  for_range(c.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < c.cols; ++j) {
        const int64_t linear = i * c.cols + j;
        index[linear] = i;
        index[n + linear] = j;
        out[linear] = c(i, j);
      }
    }
  });
  return {indices, values};
}

}  // namespace

std::tuple<Tensor, Tensor> topk_of(const Tensor& c, int64_t k) {
  check_matrix("c", c);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  return dispatch_bits(c.scalar_type(), [&](auto t, auto infinity) {
    using Key = typename decltype(t)::type;
    const Matrix<const Key> m = matrix<Key>(c);
    if (k >= m.rows * m.cols) {
      return everything(m, c.scalar_type());
    }
    const Key bound = sampled_bound(m, k, infinity);
    auto parts = collect(m, k, infinity, bound);
    int64_t held = 0;
    for (const auto& part : parts) {
      held += part.size();
    }
    if (held < k) {
      parts = collect(m, k, infinity, Key{0});
    }
    return emit(parts, k, infinity, m.cols, c.scalar_type());
  });
}

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("topk_coo", TORCH_BOX(&topk_of));
}

}  // namespace sparsegrad
