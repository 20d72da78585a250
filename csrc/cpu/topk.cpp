#include "topk.h"

namespace sparsegrad {
namespace {

constexpr int64_t kBlock = 32;       // elements looked at together: the bits of a word
constexpr int64_t kRun = 8192;      // elements between two looks at the room left
constexpr int64_t kSlack = 1 << 16;  // candidates held beyond 2 k
constexpr int kDigit = 11;           // bits of a digit of the radix selection
constexpr int64_t kSmall = 2048;     // entries from which no further digit is worth it

}  // namespace

template <class Key>
Threshold<Key> kth_largest(const std::vector<Span<Key>>& parts, int64_t k, Key infinity) {
  int64_t n = 0;
  for (const Span<Key>& part : parts) {
    n += part.size;
  }
  // The first digit is read from the parts, the others from what is left of them.
  int shift = std::numeric_limits<Key>::digits;
  std::vector<Key> ranks;
  const auto narrow_down = [&](const auto& for_each) {
    const int bits = std::min(shift, kDigit);
    shift -= bits;
    const int mask = (1 << bits) - 1;
    std::array<int64_t, 1 << kDigit> counts{};
    for_each([&](Key rank) { ++counts[static_cast<int>(rank >> shift) & mask]; });
    int digit = mask;
    for (; k > counts[digit]; --digit) {
      k -= counts[digit];
    }
    std::vector<Key> bucket(counts[digit] + 1);
    int64_t size = 0;
    for_each([&](Key rank) {  // one more is written than kept
      bucket[size] = rank;
      size += (static_cast<int>(rank >> shift) & mask) == digit;
    });
    bucket.resize(size);
    ranks = std::move(bucket);
  };
  const auto for_parts = [&](const auto& take) {
    for (const Span<Key>& part : parts) {
      for (int64_t i = 0; i < part.size; ++i) {
        take(rank_of(part.data[i], infinity));
      }
    }
  };
  if (n > kSmall) {
    narrow_down(for_parts);
  } else {
    ranks.reserve(n);
    for_parts([&](Key rank) { ranks.push_back(rank); });
  }
  while (static_cast<int64_t>(ranks.size()) > kSmall && shift > 0) {
    narrow_down([&](const auto& take) { std::for_each(ranks.begin(), ranks.end(), take); });
  }
  std::nth_element(ranks.begin(), ranks.begin() + (k - 1), ranks.end(), std::greater<>());
  const Key rank = ranks[k - 1];
  const int64_t above = std::count_if(ranks.begin(), ranks.end(), [&](Key r) { return r > rank; });
  return {rank, k - above};
}

template <class Key>
void Candidates<Key>::add(const Key* bits, int64_t n, int64_t first) {
  for (int64_t done = 0; done < n; done += kRun) {
    const int64_t end = std::min(n, done + kRun);
    make_room(end - done);
    const Key lower = lower_, infinity = infinity_;
    Key* out_bits = bits_.get();
    int64_t* out_linear = linear_.get();
    int64_t size = size_;
    simd([&]() SPARSEGRAD_INLINE {
      int64_t i = done;
      for (; i + kBlock <= end; i += kBlock) {
        // A NaN whose rank is below may pass: it is not among the k largest all the same.
        uint32_t passing = 0;
        for (int64_t j = 0; j < kBlock; ++j) {
          passing |= static_cast<uint32_t>(magnitude(bits[i + j]) >= lower) << j;
        }
        for (; passing != 0; passing &= passing - 1) {
          const int64_t j = i + std::countr_zero(passing);
          out_bits[size] = bits[j];
          out_linear[size] = first + j;
          ++size;
        }
      }
      for (; i < end; ++i) {
        out_bits[size] = bits[i];
        out_linear[size] = first + i;
        size += rank_of(bits[i], infinity) >= lower;
      }
    });
    size_ = size;
  }
}

template <class Key>
void Candidates<Key>::assign(const Key* bits, const std::vector<int64_t>& linear) {
  size_ = 0;
  make_room(static_cast<int64_t>(linear.size()));
  size_ = static_cast<int64_t>(linear.size());
  std::copy_n(bits, size_, bits_.get());
  std::copy_n(linear.data(), size_, linear_.get());
}

template <class Key>
void Candidates<Key>::append(const Candidates& other) {
  make_room(other.size_);
  std::copy_n(other.bits(), other.size_, bits_.get() + size_);
  std::copy_n(other.linear(), other.size_, linear_.get() + size_);
  size_ += other.size_;
}

template <class Key>
void Candidates<Key>::make_room(int64_t n) {
  if (size_ > 2 * k_ + kSlack) {
    prune();
  }
  if (size_ + n + 1 <= capacity_) {  // one more is written than kept
    return;
  }
  const int64_t usual = std::min(expected_, 2 * k_ + kSlack + kRun) + 1;
  capacity_ = std::max({usual, 2 * capacity_, size_ + n + 1});
  auto bits = std::make_unique_for_overwrite<Key[]>(capacity_);
  auto linear = std::make_unique_for_overwrite<int64_t[]>(capacity_);
  std::copy_n(bits_.get(), size_, bits.get());
  std::copy_n(linear_.get(), size_, linear.get());
  bits_ = std::move(bits);
  linear_ = std::move(linear);
}

template <class Key>
void Candidates<Key>::prune() {
  Threshold<Key> threshold = kth_largest<Key>({{bits_.get(), size_}}, k_, infinity_);
  int64_t kept = 0;
  for (int64_t i = 0; i < size_; ++i) {
    const Key rank = rank_of(bits_[i], infinity_);
    const bool equal = (rank == threshold.rank) & (threshold.n_equal > 0);
    threshold.n_equal -= equal;
    bits_[kept] = bits_[i];
    linear_[kept] = linear_[i];
    kept += (rank > threshold.rank) | equal;  // no branch: it could not be predicted
  }
  size_ = kept;
  lower_ = threshold.rank + 1;  // an equal one that comes later loses the tie
}

template <class Key>
std::tuple<Tensor, Tensor> emit(
    const std::vector<Candidates<Key>>& parts,
    int64_t k,
    Key infinity,
    int64_t width,
    ScalarType dtype) {
  std::vector<Span<Key>> spans;
  for (const Candidates<Key>& part : parts) {
    spans.push_back({part.bits(), part.size()});
  }
  const auto [threshold, n_equal] = kth_largest(spans, k, infinity);

  // Where each part's output begins, and how many equals it may still take.
  const int64_t n_parts = static_cast<int64_t>(parts.size());
  std::vector<int64_t> begins(n_parts), equals(n_parts);
  int64_t begin = 0, equals_left = n_equal;
  for (int64_t p = 0; p < n_parts; ++p) {
    int64_t above = 0, equal = 0;
    for (int64_t i = 0; i < spans[p].size; ++i) {
      const Key rank = rank_of(spans[p].data[i], infinity);
      above += rank > threshold;
      equal += rank == threshold;
    }
    begins[p] = begin;
    equals[p] = std::min(equal, equals_left);
    begin += above + equals[p];
    equals_left -= equals[p];
  }

  Tensor indices = empty({2, k}, ScalarType::Long), values = empty({k}, dtype);
  int64_t* rows = static_cast<int64_t*>(indices.mutable_data_ptr());
  int64_t* cols = rows + k;
  Key* out = static_cast<Key*>(values.mutable_data_ptr());
  for_chunks(n_parts, [&](int64_t p) {
    int64_t at = begins[p], row = 0, row_begin = 0, row_end = 0;
    for (int64_t i = 0; i < spans[p].size; ++i) {
      const Key rank = rank_of(spans[p].data[i], infinity);
      if (rank < threshold || (rank == threshold && equals[p]-- <= 0)) {
        continue;
      }
      const int64_t linear = parts[p].linear()[i];
      if (linear >= row_end) {
        row = linear / width;
        row_begin = row * width;
        row_end = row_begin + width;
      }
      rows[at] = row;
      cols[at] = linear - row_begin;
      out[at] = spans[p].data[i];
      ++at;
    }
  });
  return {indices, values};
}

#define INSTANTIATE(Key)                                                                         \
  template Threshold<Key> kth_largest(const std::vector<Span<Key>>&, int64_t, Key);              \
  template class Candidates<Key>;                                                                \
  template std::tuple<Tensor, Tensor> emit(                                                      \
      const std::vector<Candidates<Key>>&, int64_t, Key, int64_t, ScalarType);
INSTANTIATE(int16_t)
INSTANTIATE(int32_t)
INSTANTIATE(int64_t)

}  // namespace sparsegrad
