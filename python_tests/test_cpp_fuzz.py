"""Random inputs to the compiled CPU kernels, against float64.

`SPARSEGRAD_FUZZ` is how many inputs each operator gets, `SPARSEGRAD_FUZZ_SEED` the first one's
seed; input i has the seed plus i, which a failure shows.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import DTYPES, TOLERANCE
from sparsegrad_kernels import ops
from sparsegrad_kernels._backends import backends

N = int(os.environ.get("SPARSEGRAD_FUZZ", "300"))
SEED = int(os.environ.get("SPARSEGRAD_FUZZ_SEED", random.SystemRandom().randrange(2**40)))
SPECIAL = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, -1e-40, 6e-8, 5e-324]


@pytest.fixture(autouse=True)
def compiled() -> None:
    """The C++ kernels are loaded, or someone wanted none: else their absence is a failure."""
    cpp = backends()["cpp"]
    if not cpp.loaded:
        wanted = "SPARSEGRAD_BUILD=python" in cpp.reason or "SPARSEGRAD_BACKEND=" in cpp.reason
        (pytest.skip if wanted else pytest.fail)(f"no C++ kernels: {cpp.reason}")


class Draw:
    """One random input."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)

    def size(self) -> int:
        return self.random.choice([0, 1, 2, self.random.randrange(12), self.random.randrange(90)])

    def values(self, rows: int, cols: int, finite: bool = False) -> Tensor:
        """Continuous, tied or special values, with holes and rows and columns of zeros."""
        a = torch.randn(rows, cols, generator=self.generator, dtype=torch.float64)
        kind = self.random.randrange(5)
        if kind == 0:
            a = a.mul(1.5).round()
        elif kind == 1 and not finite:
            special = torch.tensor(SPECIAL, dtype=torch.float64)
            chosen = torch.randint(len(SPECIAL), a.shape, generator=self.generator)
            often = self.random.choice([0.01, 0.5, 1.0])
            a = torch.where(self.chance(rows, cols, often), special[chosen], a)
        elif kind == 2 and not finite:
            a *= 10.0 ** self.random.choice([-310, -42, -7, 4, 30])
        elif kind == 3:
            a = torch.full_like(a, self.random.choice([0.0, -0.0, 1.0]))
        if self.random.random() < 0.7:
            keep = self.random.random()
            a = torch.where(self.chance(rows, 1, keep), a, 0.0)
            a = torch.where(self.chance(1, cols, max(keep, self.random.random())), a, 0.0)
            a = torch.where(self.chance(rows, cols, self.random.choice([0.2, 1.0])), a, 0.0)
        return a.to(self.dtype)

    def chance(self, rows: int, cols: int, p: float) -> Tensor:
        return torch.rand(rows, cols, generator=self.generator) < p

    def layout(self, a: Tensor, writable: bool = False) -> Tensor:
        """`a` in some strides; unless it is written, also one row or column of it, expanded."""
        kind = self.random.randrange(3 if writable else 5)
        if kind == 1 or kind == 2:  # either order, gaps, an offset
            a = a.T if kind == 2 else a
            offset, step = self.random.randrange(5), self.random.choice([1, 2, 3, 17])
            stride = step * a.shape[1] + self.random.choice([0, 1, 50, 4096])
            storage = torch.full((offset + a.shape[0] * stride + 1,), torch.nan, dtype=a.dtype)
            view = storage.as_strided(a.shape, (stride, step), offset).copy_(a)
            return view.T if kind == 2 else view
        if kind == 3 and a.shape[0]:
            return a[:1].expand(a.shape)
        if kind == 4 and a.shape[1]:
            return a[:, :1].expand(a.shape)
        return a.contiguous()

    def matrix(self, rows: int, cols: int, finite: bool = False) -> Tensor:
        return self.layout(self.values(rows, cols, finite))

    def tol(self, a: Tensor) -> float:
        """Zero, or a magnitude that occurs in `a`, so that the comparison's edge is met."""
        if a.numel() == 0 or self.random.random() < 0.5:
            return 0.0
        value = abs(float(a.reshape(-1)[self.random.randrange(a.numel())]))
        return value if value < 1e30 else 0.5

    def coo(self, rows: int, cols: int, distinct: bool) -> tuple[Tensor, Tensor]:
        """Entries of a matrix in any order, and values for them, in any strides."""
        n = self.random.choice([0, 1, self.random.randrange(1 + rows * cols)])
        linear = torch.randperm(rows * cols, generator=self.generator)[:n]
        if not distinct and n:
            linear = torch.randint(rows * cols, (n,), generator=self.generator)
        if self.random.random() < 0.5:
            linear = linear.sort().values
        indices = torch.stack([linear // max(cols, 1), linear % max(cols, 1)])
        indices = indices.T.contiguous().T if self.random.random() < 0.3 else indices
        return indices, self.layout(self.values(1, n, finite=True))[0]


def fuzz(check: Callable[[Draw], None], n: int = N) -> None:
    for seed in range(SEED, SEED + n):
        try:
            check(Draw(seed))
        except BaseException:
            print(f"SPARSEGRAD_FUZZ_SEED={seed}")
            raise


def above(a: Tensor, tol: float) -> Tensor:
    return ~(a.double().abs() <= torch.tensor(tol, dtype=a.dtype).double())


def kept(a: Tensor, tol: float) -> Tensor:
    """`a` in float64 without the rows and columns that count as zero."""
    mask = above(a, tol)
    return torch.where(mask.any(1, keepdim=True) & mask.any(0), a.double(), 0.0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` without what is zero on the left: 0 there, whatever it meets."""
    rows, cols = (left != 0).any(1), (left != 0).any(0)
    out = left.new_zeros(left.shape[0], right.shape[1])
    out[rows] = left[rows][:, cols] @ right[cols]
    return out


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    kind = kinds[wanted.element_size()]
    same = (actual.contiguous().view(kind) == wanted.contiguous().view(kind)) | (
        actual.isnan() & wanted.isnan()
    )
    assert bool(same.all())


def assert_near(actual: Tensor, oracle: Tensor, scale: Tensor) -> None:
    """Same NaNs and infinities; elsewhere within the dtype's tolerance of `scale`."""
    actual64 = actual.double()
    assert bool((actual64.isnan() == oracle.isnan()).all())
    finite = oracle.isfinite()
    rest = ~finite & ~oracle.isnan()
    assert bool((actual64[rest] == oracle[rest]).all())
    smallest = torch.finfo(actual.dtype).tiny
    limit = TOLERANCE[actual.dtype] * scale + smallest
    assert bool(((actual64 - oracle).abs() <= limit)[finite].all())


def largest(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a stable sort, in which NaN is above all."""
    order = c.double().abs().reshape(-1).sort(descending=True, stable=True).indices
    linear = order[:k].sort().values
    width = max(c.shape[1], 1)
    return torch.stack([linear // width, linear % width]), c.reshape(-1)[linear]


def test_every_operator_is_compiled():
    for name in ops.__all__:
        qualified = f"sparsegrad_kernels::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"), name


def test_nonzero_rows_cols_and_compact_indices():
    def check(draw: Draw) -> None:
        a = draw.matrix(draw.size(), draw.size())
        tol = draw.tol(a)
        mask = above(a, tol)
        wanted = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        rows, cols = ops.nonzero_rows_cols(a, tol)
        assert torch.equal(rows, wanted[0]) and torch.equal(cols, wanted[1])
        *padded, counts = ops.compact_indices(a, tol)
        assert counts.tolist() == [len(rows), len(cols)]
        for got, right, n in zip(padded, wanted, a.shape, strict=True):
            fill = torch.full((n - len(right),), -1)
            assert torch.equal(got.long(), torch.cat([right, fill]))

    fuzz(check)


def test_topk_coo():
    def check(draw: Draw) -> None:
        c = draw.matrix(draw.size(), draw.size())
        k = 1 + draw.random.randrange(c.numel() + 2)
        indices, values = ops.topk_coo(c, k)
        wanted_indices, wanted_values = largest(c, k)
        assert torch.equal(indices, wanted_indices)
        assert_same_bits(values, wanted_values)

    fuzz(check)


def test_topk_coo_of_large_matrices():
    """Sampled, pruned and threaded: sizes at which those begin."""

    def check(draw: Draw) -> None:
        rows = draw.random.randrange(1, 500)
        a = draw.values(rows, draw.random.randrange(60000, 300000) // rows)
        if draw.random.random() < 0.3:  # ascending: no bound drawn from what came before is enough
            a = a.reshape(-1).sort().values.reshape(a.shape)
        c = draw.layout(a)
        k = draw.random.choice([1, 100, c.numel() // 100, c.numel() // 2, c.numel() - 1])
        indices, values = ops.topk_coo(c, k)
        wanted_indices, wanted_values = largest(c, k)
        assert torch.equal(indices, wanted_indices)
        assert_same_bits(values, wanted_values)

    fuzz(check, N // 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_coo_where_its_sample_misleads(dtype):
    """Large values at just the places sampled (see topk_coo.cpp): fewer than k reach the bound."""
    rows, cols, random, places = 600, 400, 1, []
    stride = rows * cols // 1024
    for s in range(1024):
        random = (random * 6364136223846793005 + 1442695040888963407) % 2**64
        places.append(s * stride + (random >> 33) % (stride - 16))
    sampled = (torch.tensor(places)[:, None] + torch.arange(16)).reshape(-1)
    flat = torch.randn(rows * cols)
    flat[sampled] += 100
    c = flat.to(dtype).reshape(rows, cols)
    for k in (1, 2400):
        for view in (c, c.T.contiguous().T):
            for got, wanted in zip(ops.topk_coo(view, k), largest(c, k), strict=True):
                assert torch.equal(got, wanted)


def test_sparse_dense_mm_and_coo():
    def check(draw: Draw) -> None:
        b, c, d = draw.size(), draw.size(), draw.size()
        left, right = draw.matrix(b, c, finite=True), draw.matrix(c, d, finite=True)
        if draw.random.random() < 0.3 and left.numel() and right.numel():
            left, right = left.clone(), right.clone()
            for each in (left, right):
                at = tuple(draw.random.randrange(n) for n in each.shape)
                each[at] = draw.random.choice([torch.inf, -torch.inf, torch.nan])
        tol = draw.tol(left)
        rest = kept(left, tol)
        oracle, scale = product(rest, right.double()), product(rest.abs(), right.double().abs())
        assert_near(ops.sparse_dense_mm(left, right, tol), oracle, scale)
        indices, values = ops.sparse_dense_mm_coo(left, right, tol)
        rows = above(left, tol).any(1).nonzero()[:, 0]
        assert torch.equal(indices[0], rows.repeat_interleave(d))
        assert torch.equal(indices[1], torch.arange(d).repeat(len(rows)))
        assert_near(values, oracle[rows].reshape(-1), scale[rows].reshape(-1))

    fuzz(check)


def integers(draw: Draw, rows: int, cols: int, keep: float) -> Tensor:
    """Small enough that products are exact in every dtype, so that ties are real."""
    a = torch.randint(-1, 2, (rows, cols), generator=draw.generator).double()
    a = a * draw.chance(rows, 1, keep) * draw.chance(1, cols, keep)
    return draw.layout(a.to(draw.dtype))


def check_grad_weight(draw: Draw, tokens: int, n_out: int, n_in: int) -> None:
    keep = draw.random.choice([0.0, 0.3, 0.9, 1.0])
    g, x = integers(draw, tokens, n_out, keep), integers(draw, tokens, n_in, 1.0)
    k = 1 + draw.random.randrange(
        draw.random.choice([20, n_out * n_in // 70 + 1, n_out * n_in + 2])
    )
    indices, values = ops.grad_weight_topk(g, x, k)
    wanted_indices, wanted_values = largest((g.double().T @ x.double()).to(g.dtype), k)
    assert torch.equal(indices, wanted_indices)
    assert torch.equal(values, wanted_values)


def test_grad_weight_topk():
    fuzz(lambda draw: check_grad_weight(draw, draw.size(), draw.size(), draw.size()))


def test_grad_weight_topk_of_large_products():
    """Beyond the size from which product and selection are fused."""

    def check(draw: Draw) -> None:
        n_in = draw.random.randrange(100, 900)
        check_grad_weight(draw, draw.random.randrange(1, 60), 1 + 2 * 10**6 // n_in, n_in)

    fuzz(check, N // 30)


def test_grad_weight_topk_shows_nan():
    def check(draw: Draw) -> None:
        tokens, n_out, n_in = (1 + draw.random.randrange(12) for _ in range(3))
        g, x = draw.values(tokens, n_out, finite=True), draw.values(tokens, n_in, finite=True)
        x[draw.random.randrange(tokens), draw.random.randrange(n_in)] = torch.nan
        oracle = product(kept(g, 0.0).T, x.double())
        k = 1 + draw.random.randrange(n_out * n_in)
        values = ops.grad_weight_topk(draw.layout(g, True), draw.layout(x, True), k)[1]
        assert int(values.isnan().sum()) == min(k, int(oracle.isnan().sum()))

    fuzz(check)


def test_sparse_adam_():
    def check(draw: Draw) -> None:
        shape = 1 + draw.size(), 1 + draw.size()
        indices, values = draw.coo(*shape, distinct=True)
        tensors = [draw.layout(draw.values(*shape, finite=True), True) for _ in range(3)]
        tensors[2].abs_()
        step = draw.random.choice([1, 2, 1000])
        lr, beta1, beta2 = 0.01, draw.random.choice([0.0, 0.9]), draw.random.choice([0.5, 0.999])
        old = [t.clone() for t in tensors]
        at = indices[0], indices[1]
        p, m, v = (t.double()[at] for t in tensors)
        grad = values.double()
        m_scale, v_scale = m.abs() + grad.abs(), v + grad * grad  # of the terms that may cancel
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad * grad
        size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        update = size * m / (v.sqrt() + 1e-3)
        scales = p.abs() + size * m_scale / (v.sqrt() + 1e-3), m_scale, v_scale
        ops.sparse_adam_(*tensors, indices, values, step, lr, beta1, beta2, 1e-3)
        for got, before, oracle, scale in zip(
            tensors, old, (p - update, m, v), scales, strict=True
        ):
            assert_near(got[at], oracle, scale)
            got[at] = before[at]
            assert_same_bits(got, before)

    fuzz(check)


def test_fold_():
    def check(draw: Draw) -> None:
        n_out, n_in = 1 + draw.size(), 1 + draw.size()
        r_out, r_in = 1 + draw.random.randrange(n_out), 1 + draw.random.randrange(n_in)
        weight = draw.layout(draw.values(n_out, n_in, finite=True), True)
        u = v = None
        sides = draw.random.choice(["both", "in", "out", "none"])
        if sides in ("both", "in"):
            u = draw.matrix(r_in, n_in, finite=True)
        else:
            r_in = n_in
        if sides in ("both", "out"):
            v = draw.matrix(r_out, n_out, finite=True)
        else:
            r_out = n_out
        indices, values = draw.coo(r_out, r_in, distinct=False)
        d = torch.zeros(r_out, r_in, dtype=torch.float64)
        size = d.clone()
        d.index_put_((indices[0], indices[1]), values.double(), accumulate=True)
        size.index_put_((indices[0], indices[1]), values.double().abs(), accumulate=True)
        if u is not None:
            d, size = d @ u.double(), size @ u.double().abs()
        if v is not None:
            d, size = v.double().T @ d, v.double().abs().T @ size
        oracle, scale = weight.double() + d, weight.double().abs() + size
        if sides == "none":  # summed one by one in the weight's dtype
            scale = scale + values.double().abs().sum()
        ops.fold_(weight, u, v, indices, values)
        assert_near(weight, oracle, scale)

    fuzz(check)


def run_all(draw: Draw) -> list[Tensor]:
    """All operators on whole numbers, on which any order of summation gives the same bits."""
    g, x = integers(draw, 300, 700, 0.7), integers(draw, 300, 900, 1.0)
    c = draw.matrix(500, 400)
    out = [*ops.nonzero_rows_cols(c), *ops.compact_indices(c), *ops.topk_coo(c, 3000)]
    out += [ops.sparse_dense_mm(g.T, x), *ops.sparse_dense_mm_coo(g.T, x)]
    out += ops.grad_weight_topk(g, x, 2000)
    indices, values = ops.topk_coo(c, 50000)
    state = [torch.full((500, 400), s, dtype=c.dtype) for s in (1.0, 0.5, 0.25)]
    ops.sparse_adam_(*state, indices, values, 3, 0.01, 0.9, 0.99, 1e-6)
    weight = torch.zeros(700, 900, dtype=g.dtype)
    u, v = integers(draw, 400, 900, 1.0), integers(draw, 500, 700, 1.0)
    ops.fold_(weight, u, v, indices[:, :40], torch.ones(40, dtype=g.dtype))
    plain = torch.zeros(500, 400, dtype=c.dtype)
    ops.fold_(plain, None, None, indices, values)
    sides = [torch.zeros(n, dtype=g.dtype) for n in ((500, 900), (700, 400))]
    ones = torch.ones(indices.shape[1], dtype=g.dtype)
    ops.fold_(sides[0], u, None, indices, ones)
    ops.fold_(sides[1], None, v, indices, ones)
    return [*out, *state, weight, plain, *sides]


def test_threads_give_identical_bits():
    before = torch.get_num_threads()

    def check(draw: Draw) -> None:
        seed = draw.random.randrange(2**40)
        results = []
        for threads in (1, 2, 4, 3):
            torch.set_num_threads(threads)
            results.append(run_all(Draw(seed)))
        for other in results[1:]:
            for got, wanted in zip(other, results[0], strict=True):
                if wanted.is_floating_point():
                    assert_same_bits(got, wanted)
                else:
                    assert torch.equal(got, wanted)

    try:
        fuzz(check, max(1, N // 60))
    finally:
        torch.set_num_threads(before)


def test_indices_outside_do_not_reach_memory():
    p = [torch.zeros(3, 4) for _ in range(3)]
    values = torch.ones(1)
    for bad in ([[3], [0]], [[0], [4]], [[-1], [0]], [[2**62], [0]]):
        indices = torch.tensor(bad)
        with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 3\) x \[0, 4\)"):
            torch.ops.sparsegrad_kernels.sparse_adam_(*p, indices, values, 1, 0.1, 0.9, 0.9, 1e-8)
        with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 3\) x \[0, 4\)"):
            torch.ops.sparsegrad_kernels.fold_(p[0], None, None, indices, values)
    assert all((t == 0).all() for t in p)


def test_writing_is_seen_by_autograd():
    tensors = [torch.zeros(3, 4) for _ in range(3)]
    indices, values = torch.tensor([[1], [2]]), torch.ones(1)
    versions = [t._version for t in tensors]
    ops.sparse_adam_(*tensors, indices, values, 1, 0.1, 0.9, 0.9, 1e-8)
    assert all(t._version > old for t, old in zip(tensors, versions, strict=True))
    for u, v in ((None, None), (torch.eye(4), torch.eye(3))):
        old = tensors[0]._version
        ops.fold_(tensors[0], u, v, indices, values)
        assert tensors[0]._version > old


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """4 GiB of float16, the nonzeros at its very end, as it is and transposed."""
    rows, cols = 2**15 + 1, 2**16
    a = torch.zeros(rows, cols, dtype=torch.float16)
    a[rows - 1, cols - 2], a[rows - 2, cols - 1] = 3.0, -4.0
    assert a.numel() > 2**31
    for view, flip in ((a, False), (a.T, True)):
        right, left = [rows - 2, rows - 1], [cols - 2, cols - 1]
        wanted = [left, right] if flip else [right, left]
        assert [t.tolist() for t in ops.nonzero_rows_cols(view)] == wanted
        indices, values = ops.topk_coo(view, 2)
        assert values.tolist() == ([3.0, -4.0] if flip else [-4.0, 3.0])
        by_row = [[cols - 2, cols - 1], [rows - 1, rows - 2]]
        assert indices.tolist() == (by_row if flip else [right, left[::-1]])
    b = torch.ones(cols, 3, dtype=torch.float16)
    assert ops.sparse_dense_mm(a, b)[-3:].tolist() == [[0.0] * 3, [-4.0] * 3, [3.0] * 3]
    last = torch.tensor([[rows - 1], [cols - 1]])
    ops.fold_(a, None, None, last, torch.ones(1, dtype=a.dtype))
    assert float(a[rows - 1, cols - 1]) == 1.0
