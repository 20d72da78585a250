// The k largest entries of a float32 product A B, of which only a few are computed in float32.
//
// With a' and b' for a row of A and a column of B rounded to bfloat16, and s for a' b' as computed,
//   |a b - s| <= |a - a'| |b| + |a'| |b - b'| + rounding of the sums and of s
// by Cauchy and Schwarz, in norms that cost one read of A and B. So the bfloat16 product, which such
// a CPU makes about four times as fast, gives each entry's magnitude an upper and a lower limit.
// Entries whose upper limit reaches the k-th largest lower limit are computed in float32, and the k
// largest of those are the k largest of all: exact, whatever the data.
#include "screened_topk.h"

#include "topk.h"

#include <numeric>

namespace sparsegrad {
namespace {

constexpr int64_t kLeast = 1 << 28;      // multiply-adds from which the screening pays,
constexpr int64_t kLeastDepth = 512;     // and for each entry
constexpr int64_t kBlock = 5 << 18;      // elements of the product made at a time
constexpr int64_t kMost = 12;            // more than 1 / kMost of all entries are too many candidates
constexpr int64_t kSlack = 1 << 16;      // candidates held beyond 4 k before they are sifted
constexpr int64_t kTogether = 32;        // elements looked at together
constexpr int64_t kPacked = 1 << 17;     // elements of B that stay in the cache
constexpr int64_t kLanes = 16;
constexpr float kHalfUlp = 1.01f / 256;  // of bfloat16, relative to the rounded value

bool has_fast_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
  }();
  return has;
#else
  return false;
#endif
}

// ---- Rounding, and its error ----

// A matrix in bfloat16, and for each of its columns the norms of rounded values and of errors.
struct Rounded {
  Tensor values;
  std::vector<float> norm, error;
};

// To nearest, ties to even. What hardware may take for zero becomes zero.
SPARSEGRAD_INLINE inline uint32_t round_bits(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return (rounded & 0x7f800000u) == 0 ? 0 : rounded;
}

// A norm as a float that is not below it.
float norm_of(double squares) {
  return static_cast<float>(std::sqrt(squares) * (1 + 1e-6)) + 1e-37f;
}

// Rounds n values, and adds their squares and their errors' to those of 16 columns or lanes.
SPARSEGRAD_INLINE inline void round_lanes(
    const float* __restrict__ from,
    uint16_t* __restrict__ to,
    int64_t n,
    double* __restrict__ squares,
    double* __restrict__ errors) {
  for (int64_t j = 0; j < n; ++j) {
    uint32_t bits;
    std::memcpy(&bits, from + j, 4);
    const uint32_t rounded_bits = round_bits(bits);
    float rounded;
    std::memcpy(&rounded, &rounded_bits, 4);
    to[j] = static_cast<uint16_t>(rounded_bits >> 16);
    const double error = static_cast<double>(from[j]) - rounded;
    squares[j] += static_cast<double>(rounded) * rounded;
    errors[j] += error * error;
  }
}

// `m` has adjacent rows or adjacent columns, and so has the result. Of its rows those in `rows`.
Rounded round_columns(Matrix<const float> all, const std::vector<int64_t>& rows) {
  Matrix<const float> m = all;
  m.rows = static_cast<int64_t>(rows.size());
  Rounded out{{}, std::vector<float>(m.cols), std::vector<float>(m.cols)};
  const bool by_rows = m.col_stride == 1;
  Tensor values = by_rows ? empty({m.rows, m.cols}, ScalarType::BFloat16)
                          : empty({m.cols, m.rows}, ScalarType::BFloat16);
  uint16_t* data = static_cast<uint16_t*>(values.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(kLanes, (1 << 15) / std::max<int64_t>(1, m.rows));
  for_range(m.cols, grain, [&](int64_t begin, int64_t end) {
    simd([&]() SPARSEGRAD_INLINE {
      if (by_rows) {
        std::vector<double> squares(end - begin), errors(end - begin);
        for (int64_t i = 0; i < m.rows; ++i) {
          round_lanes(
              all.row(rows[i]) + begin, data + i * m.cols + begin, end - begin,
              squares.data(), errors.data());
        }
        for (int64_t j = begin; j < end; ++j) {
          out.norm[j] = norm_of(squares[j - begin]);
          out.error[j] = norm_of(errors[j - begin]);
        }
        return;
      }
      for (int64_t j = begin; j < end; ++j) {
        double squares[kLanes] = {}, errors[kLanes] = {};
        const float* column = &m(0, j);
        uint16_t* to = data + j * m.rows;
        int64_t i = 0;
        for (; i + kLanes <= m.rows; i += kLanes) {
          round_lanes(column + i, to + i, kLanes, squares, errors);
        }
        round_lanes(column + i, to + i, m.rows - i, squares, errors);
        out.norm[j] = norm_of(std::accumulate(squares, squares + kLanes, 0.0));
        out.error[j] = norm_of(std::accumulate(errors, errors + kLanes, 0.0));
      }
    });
  });
  out.values = by_rows ? values : torch::stable::transpose(values, 0, 1);
  return out;
}

bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

// ---- Screening ----

// Entries that may be among the k largest, in order: those whose upper limit is not below `least`,
// the k-th largest lower limit of what has been seen.
class Screened {
 public:
  // `flushed`: what hardware may lose that takes the smallest floats for zero.
  Screened(int64_t k, float least, float flushed) : k_(k), least_(least), flushed_(flushed) {}

  // A row of the product: |a b_j - s_j| <= a_error * b_norm_j + a_norm * b_error_j + half an ulp.
  void add(
      const uint16_t* s, int64_t n, int64_t first, float a_norm, float a_error,
      const float* b_norm, const float* b_error) {
    if (size() > 4 * k_ + kSlack) {
      sift();
    }
    simd([&]() SPARSEGRAD_INLINE {
      float lower[kTogether], upper[kTogether];
      for (int64_t begin = 0; begin < n; begin += kTogether) {
        const int64_t count = std::min(kTogether, n - begin);
        int32_t largest = 0;  // a magnitude's bits have its order, and integers take vectors
        for (int64_t j = 0; j < count; ++j) {
          const uint32_t bits = static_cast<uint32_t>(s[begin + j] & 0x7fff) << 16;
          float magnitude;
          std::memcpy(&magnitude, &bits, 4);
          const float limit = (a_error * b_norm[begin + j] + a_norm * b_error[begin + j]) * 1.001f +
                              magnitude * kHalfUlp + flushed_;
          lower[j] = std::max(0.0f, magnitude - limit);
          upper[j] = magnitude + limit;
          largest = std::max(largest, std::bit_cast<int32_t>(upper[j]));
        }
        if (largest < std::bit_cast<int32_t>(least_)) {
          continue;
        }
        for (int64_t j = 0; j < count; ++j) {
          if (upper[j] >= least_) {
            linear_.push_back(first + begin + j);
            lower_.push_back(std::bit_cast<int32_t>(lower[j]));
            upper_.push_back(upper[j]);
          }
        }
      }
    });
  }

  void append(const Screened& other) {
    linear_.insert(linear_.end(), other.linear_.begin(), other.linear_.end());
    lower_.insert(lower_.end(), other.lower_.begin(), other.lower_.end());
    upper_.insert(upper_.end(), other.upper_.begin(), other.upper_.end());
  }

  void sift() {
    if (size() < k_) {
      return;
    }
    const auto kth = kth_largest<int32_t>({{lower_.data(), size()}}, k_, infinity_bits<float>());
    least_ = std::max(least_, std::bit_cast<float>(kth.rank));
    int64_t kept = 0;
    for (int64_t i = 0; i < size(); ++i) {
      linear_[kept] = linear_[i];
      lower_[kept] = lower_[i];
      upper_[kept] = upper_[i];
      kept += upper_[i] >= least_;
    }
    linear_.resize(kept);
    lower_.resize(kept);
    upper_.resize(kept);
  }

  int64_t size() const {
    return static_cast<int64_t>(linear_.size());
  }
  float least() const {
    return least_;
  }
  const std::vector<int64_t>& linear() const {
    return linear_;
  }

 private:
  int64_t k_;
  float least_, flushed_;
  std::vector<int64_t> linear_;
  std::vector<int32_t> lower_;  // bits
  std::vector<float> upper_;
};

// The candidates' linear indices in the compacted product; nothing if they are too many.
std::optional<std::vector<int64_t>> screen(
    const Tensor& left, const std::vector<int64_t>& tokens, const Tensor& right, int64_t k) {
  const int64_t n_rows = left.size(1), n_cols = right.size(1), n = right.size(0);
  std::vector<int64_t> all(n);
  std::iota(all.begin(), all.end(), 0);
  const Rounded b = round_columns(matrix<float>(right), all);
  // Sums in float32 are off by at most n ulps of the product of norms, in s and in what is
  // computed for the candidates.
  std::vector<float> b_norm(n_cols), b_error(n_cols);
  const float sums = static_cast<float>(n) * 0x1p-23f;
  for (int64_t j = 0; j < n_cols; ++j) {
    b_norm[j] = (b.norm[j] + b.error[j]) * (1 + sums);
    b_error[j] = b.error[j] + 3 * sums * (b.norm[j] + b.error[j]);
  }
  if (!all_finite(b_norm)) {
    return {};
  }

  const float flushed = static_cast<float>(n + 2) * 1e-37f;
  Screened held(k, 0, flushed);
  const int64_t step = std::max<int64_t>(64, kBlock / n_cols);
  Tensor block = empty({std::min(step, n_rows), n_cols}, ScalarType::BFloat16);
  for (int64_t begin = 0; begin < n_rows; begin += step) {
    const int64_t rows = std::min(step, n_rows - begin);
    Tensor source = left, product = torch::stable::narrow(block, 0, 0, rows);
    const Rounded a =
        round_columns(matrix<float>(torch::stable::narrow(source, 1, begin, rows)), tokens);
    if (!all_finite(a.norm) || !all_finite(a.error)) {
      return {};
    }
    mm_out(product, torch::stable::transpose(a.values, 0, 1), b.values);
    const uint16_t* made = static_cast<const uint16_t*>(product.const_data_ptr());
    const int64_t n_parts = std::min(rows, num_chunks(rows * n_cols, 1 << 15));
    std::vector<Screened> parts(n_parts, Screened(k, held.least(), flushed));
    for_chunks(n_parts, [&](int64_t p) {
      for (int64_t i = rows * p / n_parts; i < rows * (p + 1) / n_parts; ++i) {
        parts[p].add(
            made + i * n_cols, n_cols, (begin + i) * n_cols, a.norm[i], a.error[i], b_norm.data(),
            b_error.data());
      }
      parts[p].sift();
    });
    for (const Screened& part : parts) {
      held.append(part);
    }
    held.sift();
    if (held.size() > n_rows * n_cols / kMost) {
      return {};
    }
  }
  if (held.least() == 0) {  // then rows of zeros may be among the k largest
    return {};
  }
  return held.linear();
}

// ---- The candidates in float32 ----

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

// sums += a * b, by lanes. n is a multiple of two vectors.
SPARSEGRAD_INLINE inline void add_products(
    const float* a, const float* b, int64_t n, float* sums) {
  Lanes even = {}, odd = {}, x, y;
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    std::memcpy(&x, a + i, sizeof(x));
    std::memcpy(&y, b + i, sizeof(y));
    even += x * y;
    std::memcpy(&x, a + i + kLanes, sizeof(x));
    std::memcpy(&y, b + i + kLanes, sizeof(y));
    odd += x * y;
  }
  std::memcpy(&x, sums, sizeof(x));
  x += even + odd;
  std::memcpy(sums, &x, sizeof(x));
}

// Rows [begin, begin + n) of columns of m, to `out [columns, padded]`.
void pack(Matrix<const float> m, int64_t begin, int64_t n, int64_t padded, float* out) {
  for_range(m.cols, 64, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; tile += kLanes) {
      const int64_t end = std::min(last, tile + kLanes);
      for (int64_t i = 0; i < padded; ++i) {
        for (int64_t j = tile; j < end; ++j) {
          out[j * padded + i] = i < n ? m(begin + i, j) : 0.0f;
        }
      }
    }
  });
}

// Their bits. A chunk of the sums at a time, for which B's chunk stays in the cache.
std::vector<int32_t> products_at(
    Matrix<const float> left,
    const std::vector<int64_t>& tokens,
    Matrix<const float> right,
    const std::vector<int64_t>& linear) {
  constexpr int64_t kStep = 2 * kLanes;
  const int64_t n_linear = static_cast<int64_t>(linear.size());
  const int64_t chunk = std::clamp<int64_t>(kPacked / right.cols / kStep, 1, 16) * kStep;
  std::vector<float> sums(n_linear * kLanes), packed(right.cols * chunk);
  for (int64_t begin = 0; begin < right.rows; begin += chunk) {
    const int64_t n = std::min(chunk, right.rows - begin);
    const int64_t padded = (n + kStep - 1) / kStep * kStep;
    pack(right, begin, n, padded, packed.data());
    for_range(n_linear, 1 << 10, [&](int64_t first, int64_t last) {
      std::vector<float> a(padded);
      int64_t row_begin = 0, row_end = 0;
      simd([&]() SPARSEGRAD_INLINE {
        for (int64_t c = first; c < last; ++c) {
          if (linear[c] >= row_end) {
            const int64_t row = linear[c] / right.cols;
            row_begin = row * right.cols;
            row_end = row_begin + right.cols;
            for (int64_t i = 0; i < n; ++i) {
              a[i] = left(tokens[begin + i], row);
            }
          }
          const float* b = packed.data() + (linear[c] - row_begin) * padded;
          add_products(a.data(), b, padded, sums.data() + c * kLanes);
        }
      });
    });
  }
  std::vector<int32_t> bits(n_linear);
  for (int64_t c = 0; c < n_linear; ++c) {
    const float* lanes = sums.data() + c * kLanes;
    bits[c] = std::bit_cast<int32_t>(std::accumulate(lanes, lanes + kLanes, 0.0f));
  }
  return bits;
}

bool has_adjacent(const Tensor& m) {
  return m.stride(0) == 1 || m.stride(1) == 1;
}

}  // namespace

std::optional<std::tuple<Tensor, Tensor>> screened_topk(
    const Tensor& g, const RowsCols& kept, const Tensor& right, int64_t k) {
  const int64_t n_rows = static_cast<int64_t>(kept.cols.size());
  const int64_t n_cols = right.size(1), n = right.size(0);
  if (!has_fast_bfloat16() || g.scalar_type() != ScalarType::Float || !has_adjacent(g) ||
      !has_adjacent(right) || n < kLeastDepth || k > n_rows * n_cols / 64 || n_rows * n_cols < kLeast / n) {
    return {};
  }
  // Tokens of adjacent outputs are read where they are; else what is kept is gathered.
  Tensor left = g;
  std::vector<int64_t> tokens = kept.rows;
  if (n_rows < g.size(1) || g.stride(1) != 1) {
    left = gather(g, kept.rows, kept.cols);
    std::iota(tokens.begin(), tokens.end(), 0);
  }
  auto found = screen(left, tokens, right, k);
  if (!found) {
    return {};
  }
  std::vector<int64_t>& linear = *found;
  const std::vector<int32_t> bits =
      products_at(matrix<float>(left), tokens, matrix<float>(right), linear);
  for (int64_t& index : linear) {
    index = kept.cols[index / n_cols] * n_cols + index % n_cols;
  }
  std::vector<Candidates<int32_t>> candidates;
  candidates.emplace_back(k, infinity_bits<float>(), 0, static_cast<int64_t>(linear.size()));
  candidates[0].assign(bits.data(), linear);
  return emit(candidates, k, infinity_bits<float>(), n_cols, ScalarType::Float);
}

}  // namespace sparsegrad
