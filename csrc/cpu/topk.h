// The k largest magnitudes of a stream of elements, exact, ties to the first.
#pragma once

#include "../common.h"
#include "../select.h"

namespace sparsegrad {

template <class Key>
struct Threshold {
  Key rank;         // the k-th largest
  int64_t n_equal;  // how many of its equals are among the k largest, the first ones
};

template <class Key>
struct Span {
  const Key* data;
  int64_t size;
};

// By radix: a histogram per digit, from the highest one, of the entries that share those above.
template <class Key>
Threshold<Key> kth_largest(const std::vector<Span<Key>>& parts, int64_t k, Key infinity);

// Elements that may be among the k largest, in the order they came: those of rank at least `lower`.
// `lower` rises whenever more than a multiple of k are held.
template <class Key>
class Candidates {
 public:
  // `n`: how many elements are to come.
  Candidates(int64_t k, Key infinity, Key lower, int64_t n)
      : k_(k), expected_(n), infinity_(infinity), lower_(lower) {}

  // n elements at linear indices from `first` on.
  void add(const Key* bits, int64_t n, int64_t first);
  // Elements at given linear indices, ascending, in place of those held.
  void assign(const Key* bits, const std::vector<int64_t>& linear);
  // What `other` has held since it was made or cleared, all of later indices.
  void append(const Candidates& other);
  void clear(Key lower) {
    size_ = 0;
    lower_ = lower;
  }

  int64_t size() const {
    return size_;
  }
  Key lower() const {
    return lower_;
  }
  const Key* bits() const {
    return bits_.get();
  }
  const int64_t* linear() const {
    return linear_.get();
  }

 private:
  void make_room(int64_t n);
  void prune();

  int64_t k_, expected_, size_ = 0, capacity_ = 0;
  Key infinity_, lower_;
  std::unique_ptr<Key[]> bits_;
  std::unique_ptr<int64_t[]> linear_;
};

// The k largest of all parts (they hold at least k), the parts being in order of linear index,
// as `indices [2, k]` and `values [k]` of a matrix with `width` columns.
template <class Key>
std::tuple<Tensor, Tensor> emit(
    const std::vector<Candidates<Key>>& parts,
    int64_t k,
    Key infinity,
    int64_t width,
    ScalarType dtype);

// topk_coo
std::tuple<Tensor, Tensor> topk_of(const Tensor& c, int64_t k);

}  // namespace sparsegrad
