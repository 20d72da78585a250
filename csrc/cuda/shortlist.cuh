// The entries of a matrix that may be its k largest, where who made them knows: topk_coo's kernels
// then select from these.
#pragma once

#include "common.cuh"

namespace sparsegrad {

struct ShortlistState {
  unsigned long long count;  // of entries that came; more than the capacity: some were lost
  int32_t wanted;            // whether there is a threshold for entries to reach
  int32_t whole;             // whether the k largest are not on the list, but in the matrix only
};

// All of it on the device. The first `count` slots hold the entries in row-major order.
struct Shortlist {
  const ShortlistState* state;  // null: there is no list
  const int64_t* linear;
  const void* values;  // of the matrix's dtype
  int64_t capacity;
};

// topk_coo(c, k); c is read only where `whole` is set or there is no list. A threshold that is not
// null is nearly that of the k-th largest, and afterwards the next call's. In topk_coo.cu.
std::tuple<Tensor, Tensor> topk_with_shortlist(
    const Tensor& c, int64_t k, const Shortlist& shortlist, float* threshold);

// Whether selecting from c near a threshold takes one launch, all of it in the L2 cache.
bool is_selected_at_once(const Tensor& like, int64_t n, int64_t k);

}  // namespace sparsegrad
