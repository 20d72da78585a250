// topk_coo(g^T x, k), without the tokens and the outputs whose g is zero.
//
// The product is made in blocks of its rows, each of which is searched while it is in cache. Only
// a block and the entries that may be among the k largest so far are held, never the product.
// Where bfloat16 products are fast, most of a float32 product is not made (screened_topk.h).
#include "product.h"
#include "screened_topk.h"
#include "topk.h"

namespace sparsegrad {
namespace {

constexpr int64_t kBlock = 1 << 19;  // elements of the product made at a time: fewer slow it down
constexpr int64_t kFewTokens = 512;  // whose product costs no more than searching it by blocks
constexpr int64_t kSmall = 1 << 23;  // elements that may be held

// Rows [begin, end) of the product's compacted rows, and the zero rows before each, to `out`.
template <class Key>
void add_rows(
    Matrix<const Key> block,
    int64_t begin,
    int64_t end,
    int64_t row_before,
    const int64_t* row_of,
    const std::vector<Key>& zeros,
    Candidates<Key>& out) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t before = i == begin ? row_before : row_of[i - 1];
    for (int64_t row = before + 1; row < row_of[i] && out.lower() == 0; ++row) {
      out.add(zeros.data(), block.cols, row * block.cols);
    }
    out.add(block.row(i), block.cols, row_of[i] * block.cols);
  }
}

template <class Key>
std::tuple<Tensor, Tensor> fused(
    const Tensor& g, const Tensor& x, int64_t k, Key infinity, const RowsCols& kept) {
  const int64_t n_out = g.size(1), n_in = x.size(1);
  const int64_t n_kept = static_cast<int64_t>(kept.cols.size());
  const bool all_tokens = static_cast<int64_t>(kept.rows.size()) == g.size(0);
  std::vector<int64_t> all_in(n_in);
  const Tensor right = gather(x, kept.rows, all_in);  // [kept tokens, in]
  if (auto found = screened_topk(g, kept, right, k)) {
    return *found;
  }

  const int64_t step = std::max<int64_t>(16, kBlock / n_in);
  Tensor block = empty({std::min(step, n_kept), n_in}, g.scalar_type());
  const std::vector<Key> zeros(n_in);
  std::vector<Candidates<Key>> held, parts;
  held.emplace_back(k, infinity, 0, n_out * n_in);

  for (int64_t begin = 0; begin < n_kept; begin += step) {
    const int64_t rows = std::min(step, n_kept - begin);
    const int64_t* row_of = kept.cols.data() + begin;

    // The block: g[tokens][:, row_of]^T @ x[tokens].
    const bool run = row_of[rows - 1] - row_of[0] == rows - 1;
    Tensor source = g, product = torch::stable::narrow(block, 0, 0, rows);
    Tensor left = run ? torch::stable::narrow(source, 1, row_of[0], rows) : g;
    if (!run || !all_tokens) {
      std::vector<int64_t> cols(row_of, row_of + rows);
      left = gather(left, kept.rows, cols);
    }
    mm_out(product, torch::stable::transpose(left, 0, 1), right);

    // Its candidates, by threads, appended in order.
    const Matrix<const Key> made = matrix<Key>(product);
    const int64_t n_parts = std::min(rows, num_chunks(rows * n_in, 1 << 15));
    while (static_cast<int64_t>(parts.size()) < n_parts) {
      parts.emplace_back(k, infinity, 0, step * n_in / n_parts);
    }
    const int64_t row_before = begin == 0 ? -1 : row_of[-1];
    for_chunks(n_parts, [&](int64_t p) {
      Candidates<Key>& part = n_parts == 1 ? held[0] : parts[p];
      const int64_t first = rows * p / n_parts, last = rows * (p + 1) / n_parts;
      if (n_parts > 1) {
        part.clear(held[0].lower());
      }
      add_rows(made, first, last, first == 0 ? row_before : row_of[first - 1], row_of, zeros, part);
    });
    for (int64_t p = 0; p < n_parts && n_parts > 1; ++p) {
      held[0].append(parts[p]);
    }
  }
  const int64_t last = n_kept == 0 ? -1 : kept.cols.back();
  for (int64_t row = last + 1; row < n_out && held[0].lower() == 0; ++row) {
    held[0].add(zeros.data(), n_in, row * n_in);
  }
  return emit(held, k, infinity, n_in, g.scalar_type());
}

std::tuple<Tensor, Tensor> grad_weight_topk(
    const Tensor& g, const Tensor& x, int64_t k, double tol) {
  check_matrix("g", g);
  check_matrix("x", x);
  check_dtype("x", x, g.scalar_type());
  check_size("x", x.size(0), g.size(0));
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const NoGrad no_grad;
  const int64_t n = g.size(1) * x.size(1);
  // Of few entries, or where many are kept, the product itself is no larger than the candidates.
  if (n < kBlock || k > n / 64) {
    return topk_of(product_of(torch::stable::transpose(g, 0, 1), x, tol), k);
  }
  const RowsCols kept = find_rows_cols(g, tol);
  const bool all_outputs = static_cast<int64_t>(kept.cols.size()) == g.size(1);
  if (all_outputs && n <= kSmall && static_cast<int64_t>(kept.rows.size()) < kFewTokens) {
    std::vector<int64_t> all_in(x.size(1));
    Tensor left = gather(g, kept.rows, kept.cols);
    return topk_of(mm(torch::stable::transpose(left, 0, 1), gather(x, kept.rows, all_in)), k);
  }
  return dispatch_bits(g.scalar_type(), [&](auto t, auto infinity) {
    return fused<typename decltype(t)::type>(g, x, k, infinity, kept);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsegrad_kernels, CPU, m) {
  m.impl("grad_weight_topk", TORCH_BOX(&grad_weight_topk));
}

}  // namespace sparsegrad
