"""The operators on a GPU, whichever backend serves it there: against float64 on the CPU, without
waiting for the device, in CUDA graphs, on other streams and devices.

SPARSEGRAD_BACKEND=reference|cuda|triton chooses who is tested. SPARSEGRAD_TEST_DEVICE=cpu runs the
same tests on CPU tensors, where nothing is captured: it shows that the tests themselves are right.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cases import DTYPES, SHAPES, TOLERANCE, orthogonal, sparse_matrix, strided_views
from sparsegrad_kernels import SparseAdam, SparseGradLinear, ops
from sparsegrad_kernels.basis import Basis
from sparsegrad_kernels.ops._rounding import round_stochastically
from sparsegrad_kernels.ops.token_products import token_products
from sparsegrad_kernels.ops.topk_coo import SLACK

DEVICE = torch.device(os.environ.get("SPARSEGRAD_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="no GPU (SPARSEGRAD_TEST_DEVICE=cpu runs dry)"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# [tokens, out_features, in_features]: one block and less; many blocks, none of them full.
SIZES = {"small": (37, 21, 19), "large": (515, 1037, 390)}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
# And of which vectors of 16 bytes can be read; with few tiles, of which blocks share the depth.
PRODUCT_SIZES = {
    **SIZES,
    "small_aligned": (40, 24, 16),
    "large_aligned": (520, 1040, 392),
    "deep_aligned": (48, 3104, 40),
    "long_aligned": (3104, 48, 40),
}
product_sizes = pytest.mark.parametrize("size", PRODUCT_SIZES.values(), ids=PRODUCT_SIZES)
HYPER = (2**-7, 0.9, 0.99, 1e-6)  # lr as a float32 is exact
ADAM = (3, *HYPER)
# With both factors of a product rounded to the 11 bits of tf32, 2^-10: in tolerances of float32.
TF32 = 1e-3 / TOLERANCE[torch.float32]
# Output sizes that depend on the data have to be read, once, by contract.
WAITING = ("nonzero_rows_cols", "sparse_dense_mm_coo")
OPS = (
    "compact_indices",
    "topk_coo",
    "sparse_dense_mm",
    "grad_weight_topk",
    "sparse_adam_",
    "fold_",
)
# And how some are run besides.
VARIANTS = ("fold_ u", "fold_ v", "topk_coo near", "_token_products")


def is_reference(op: str) -> bool:
    qualified = f"sparsegrad_kernels::{op.partition(' ')[0]}"
    return ON_GPU and not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA")


def skip_if_reference(op: str) -> None:
    """The reference is written for legibility: it may wait for the device."""
    if is_reference(op):
        pytest.skip(f"{op} is served by the reference")


@contextmanager
def no_sync() -> Iterator[None]:
    """Waiting for the device is an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def multiplied_as(precision: str) -> Iterator[None]:
    """How torch may multiply float32 matrices: "tf32" or "ieee"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def put(t: Tensor) -> Tensor:
    """A copy on the device, also where that is the CPU: operators write in place."""
    return t.to(DEVICE, copy=True)


# ---- Inputs and oracles ----


def special_matrix(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """With NaN, infinities, both zeros, numbers below the smallest normal one, and many ties."""
    info = torch.finfo(dtype)
    values = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.tiny / 4, -info.tiny / 4, 1.0, -1.0]
    pool = torch.tensor([*values, *[0.0] * 30], dtype=torch.float64).to(dtype)
    return pool[torch.randint(len(pool), (rows, cols), generator=generator)]


def distinct_entries(rows: int, cols: int, k: int, generator: torch.Generator) -> Tensor:
    linear = torch.randperm(rows * cols, generator=generator)[:k].sort().values
    return torch.stack([linear // cols, linear % cols])


def nonzero_oracle(a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    hit = ~(a.double().abs() <= tol)
    return hit.any(1).nonzero()[:, 0], hit.any(0).nonzero()[:, 0]


def topk_oracle(c: Tensor, k: int) -> Tensor:
    """Linear indices: NaN first, then by magnitude, then the lowest."""
    flat = c.double().reshape(-1)
    by_size = flat.abs().nan_to_num(torch.inf, torch.inf).argsort(descending=True, stable=True)
    order = by_size[flat[by_size].isnan().int().argsort(descending=True, stable=True)]
    return order[:k].sort().values


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    """The same shape, dtype and bits, -0.0 and NaN included."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    view = integer[actual.element_size()]
    one, other = (t.detach().cpu().contiguous().view(view) for t in (actual, expected))
    assert torch.equal(one, other), f"{int((one != other).sum())} of {one.numel()} differ"


def assert_close(actual: Tensor, oracle: Tensor, scale: Tensor, factor: float = 1) -> None:
    info = torch.finfo(actual.dtype)
    limit = factor * TOLERANCE[actual.dtype] * scale + info.smallest_normal * info.eps
    error = (actual.detach().cpu().double() - oracle).abs()
    assert bool((error <= limit).all()), f"error {(error / limit).max()} times what is allowed"


def adam_arguments(size, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    _, n_out, n_in = size
    indices = distinct_entries(n_out, n_in, n_out * n_in // 20, generator)
    param, exp_avg, exp_avg_sq = torch.randn(3, n_out, n_in, generator=generator).to(dtype)
    values = torch.randn(indices.shape[1], generator=generator).to(dtype)
    return [param, exp_avg, exp_avg_sq.square(), indices, values]


def adam_oracle(arguments: list[Tensor], step: int) -> list[Tensor]:
    lr, beta1, beta2, eps = HYPER
    p, m, v, indices, g = (t.double() if t.is_floating_point() else t for t in arguments)
    p, m, v, at = p.clone(), m.clone(), v.clone(), tuple(indices)
    m[at] = beta1 * m[at] + (1 - beta1) * g
    v[at] = beta2 * v[at] + (1 - beta2) * g * g
    p[at] -= lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) * m[at] / (v[at].sqrt() + eps)
    return [p, m, v]


SIDES = ("in", "out")  # of the bases u and v


def fold_arguments(size, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Some entries are given twice."""
    _, n_out, n_in = size
    u = orthogonal(n_in, generator, dtype)[: n_in - 3].clone()
    v = orthogonal(n_out, generator, dtype)[: n_out - 2].clone()
    n = n_out * n_in // 100 + 5
    rows = torch.randint(n_out - 2, (n,), generator=generator)
    cols = torch.randint(n_in - 3, (n,), generator=generator)
    values = torch.randn(n, generator=generator).to(dtype)
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
    return [weight, u, v, torch.stack([rows, cols]), values]


def fold_oracle(weight, u, v, indices, values) -> tuple[Tensor, Tensor]:
    """And the scale of its errors."""
    update = torch.zeros(v.shape[0], u.shape[0], dtype=torch.float64)
    update.index_put_(tuple(indices), values.double(), accumulate=True)
    size = torch.zeros_like(update)
    size.index_put_(tuple(indices), values.double().abs(), accumulate=True)
    scale = weight.double().abs() + v.double().abs().T @ size @ u.double().abs()
    return weight.double() + v.double().T @ update @ u.double(), scale


# ---- Results ----


def check_detection_and_selection(a: Tensor) -> None:
    for layout, view in strided_views(put(a)).items():
        for tol in (0.0, 0.5):
            rows, cols = nonzero_oracle(a, tol)
            got = ops.nonzero_rows_cols(view, tol)
            assert_bits(got[0], rows)
            assert_bits(got[1], cols)
            padded_rows, padded_cols, counts = ops.compact_indices(view, tol)
            assert counts.tolist() == [len(rows), len(cols)], layout
            for padded, right in ((padded_rows, rows), (padded_cols, cols)):
                assert_bits(padded[: len(right)], right.int())
                assert bool((padded[len(right) :] == -1).all())
        n = a.numel()
        for k in {1, max(1, n // 50), max(1, n - 1), n + 5}:
            chosen = topk_oracle(a, k)
            indices, values = ops.topk_coo(view, k)
            width = max(a.shape[1], 1)
            assert_bits(indices, torch.stack([chosen // width, chosen % width]))
            assert_bits(values, a.reshape(-1)[chosen])


@dtypes
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, (1031, 777)],
    ids=lambda s: f"{'small' if sum(s) < 1000 else 'large'}{s[0]}x{s[1]}",
)
def test_detection_and_selection(shape, dtype, generator):
    check_detection_and_selection(sparse_matrix(*shape, dtype, generator))


@dtypes
@sizes
def test_detection_and_selection_of_what_is_special(size, dtype, generator):
    check_detection_and_selection(special_matrix(*size[1:], dtype, generator))


@dtypes
@product_sizes
def test_products(size, dtype, generator):
    tokens, n_out, n_in = size
    a = sparse_matrix(tokens, n_out, dtype, generator)
    b = torch.randn(n_out, n_in, generator=generator).to(dtype)
    b[:, 0] = 0
    oracle, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for left in strided_views(put(a)).values():
        for right in strided_views(put(b)).values():
            assert_close(ops.sparse_dense_mm(left, right), oracle, scale)
    rows, _ = nonzero_oracle(a, 0.0)
    indices, values = ops.sparse_dense_mm_coo(put(a), put(b))
    every_col = torch.arange(n_in).repeat(len(rows))
    assert_bits(indices, torch.stack([rows.repeat_interleave(n_in), every_col]))
    assert_close(values, oracle[rows].reshape(-1), scale[rows].reshape(-1))


@dtypes
@product_sizes
def test_token_products(size, dtype, generator):
    """Of what is asked for; zero tokens take no part, whatever the other factor holds there."""
    tokens, n_out, n_in = size
    g = sparse_matrix(tokens, n_out, dtype, generator)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
    wide = [t.double() for t in (g, x, weight)]
    g64, x64, w64 = wide
    oracles = (g64 @ w64, g64.T @ x64, g64.sum(0))
    scales = (g64.abs() @ w64.abs(), g64.abs().T @ x64.abs(), g64.abs().sum(0))
    x[~(g64 != 0).any(1)] = torch.nan
    layouts = [strided_views(put(t)) for t in (g, x, weight)]
    for layout in layouts[0]:
        left, other, factor = (views[layout] for views in layouts)
        for asked in ((True, True, True), (True, False, False), (False, True, False)):
            asked_of = other if asked[1] else None, factor if asked[0] else None, asked[2]
            got, again = (token_products(left, *asked_of) for _ in range(2))
            for result, same, oracle, scale, wanted in zip(
                got, again, oracles, scales, asked, strict=True
            ):
                assert_bits(result, same)
                if wanted:
                    assert result.shape == oracle.shape
                    assert_close(result, oracle, scale)
                else:
                    assert result.numel() == 0


@dtypes
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["none", "all"])
def test_token_products_of_no_token_and_of_all_small(share, dtype, generator):
    g = (torch.ones(70, 24) * share).to(dtype)
    x, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (70, 24))
    got = token_products(put(g), put(x), put(weight), True)
    g, x, weight = g.double(), x.double(), weight.double()
    for result, oracle, scale in (
        (got[0], g @ weight, g @ weight.abs()),
        (got[1], g.T @ x, g.T @ x.abs()),
        (got[2], g.sum(0), g.sum(0)),
    ):
        assert_close(result, oracle, scale)


@dtypes
@sizes
@pytest.mark.parametrize("kind", ["normal", "special", "ties"])
def test_topk_near_a_threshold(kind, size, dtype, generator):
    """It decides nothing: it serves, lets too many or too few through, or is none."""
    shape = size[1:]
    if kind == "special":
        c = special_matrix(*shape, dtype, generator)
    else:
        c = torch.randn(*shape, generator=generator).to(dtype)
        c = c.round() if kind == "ties" else c
    n = c.numel()
    for k in {1, n // 100 + 1, n // 3, n - 1, n, n + 5}:
        chosen = topk_oracle(c, k)
        values = c.reshape(-1)[chosen]
        finite = values[~values.isnan()].abs().float()
        least = finite.amin() if len(finite) else torch.tensor(torch.inf)
        for view in strided_views(put(c)).values():
            for share in (torch.nan, 0.0, 0.1, 0.8, 1.0, 1.1, 1e3, torch.inf):
                threshold = put((share * least)[None])
                got = ops.topk_coo(view, k, threshold)
                assert_bits(got[0], torch.stack([chosen // shape[1], chosen % shape[1]]))
                assert_bits(got[1], values)
                torch.testing.assert_close(threshold.cpu(), SLACK * least[None])


@dtypes
def test_rows_and_columns_of_zeros_take_no_part_small(dtype, generator):
    a = sparse_matrix(37, 29, dtype, generator)
    a[:, 3], a[5] = 0, 0
    b = torch.randn(29, 19, generator=generator).to(dtype)
    b[3] = torch.nan
    wanted = ops.sparse_dense_mm(a.double(), b.double())
    assert bool(wanted.isfinite().all())
    got = ops.sparse_dense_mm(put(a), put(b))
    assert_close(got, wanted, a.double().abs() @ b.double().abs().nan_to_num())


def test_gradient_of_the_product_small(generator):
    a = sparse_matrix(37, 21, torch.float64, generator)
    b = torch.randn(21, 19, generator=generator, dtype=torch.float64)
    out_grad = torch.randn(37, 19, generator=generator, dtype=torch.float64)
    on_device = [put(t).requires_grad_() for t in (a, b)]
    ops.sparse_dense_mm(*on_device).backward(put(out_grad))
    for t, wanted in zip(on_device, (out_grad @ b.T, a.T @ out_grad), strict=True):
        assert t.grad is not None
        torch.testing.assert_close(t.grad.cpu(), wanted)


@dtypes
@product_sizes
def test_grad_weight_topk_where_sums_are_exact(size, dtype, generator):
    """Small integers: every type holds their products' sums, so that ties are ties."""
    tokens, n_out, n_in = min(size[0], 200), *size[1:]
    g, x = (torch.randint(-1, 2, (tokens, n), generator=generator) for n in (n_out, n_in))
    g = (g * (torch.rand(tokens, 1, generator=generator) < 0.67)).to(dtype)
    x = x.to(dtype)
    product = (g.double().T @ x.double()).to(dtype)
    for k in (1, n_out * n_in // 100 + 1, n_out * n_in):
        chosen = topk_oracle(product, k)
        for left in strided_views(put(g)).values():
            for right in strided_views(put(x)).values():
                indices, values = ops.grad_weight_topk(left, right, k)
                assert_bits(indices, torch.stack([chosen // n_in, chosen % n_in]))
                torch.testing.assert_close(
                    values.cpu(), product.reshape(-1)[chosen], rtol=0, atol=0
                )


def check_grad_weight_topk(g: Tensor, x: Tensor, k: int, factor: float = 1) -> Tensor:
    """Each entry is right, and none that was left out is larger, beyond rounding: the values."""
    oracle, scale = g.double().T @ x.double(), g.double().abs().T @ x.double().abs()
    slack = factor * TOLERANCE[g.dtype] * scale
    on_device = put(g), put(x)
    indices, values = ops.grad_weight_topk(*on_device, k)
    again = ops.grad_weight_topk(*on_device, k)
    assert_bits(again[0], indices)
    assert_bits(again[1], values)
    at = tuple(indices.cpu())
    linear = at[0] * x.shape[1] + at[1]
    assert len(linear) == k and bool((linear[1:] > linear[:-1]).all())
    assert_close(values, oracle[at], scale[at], factor)
    left_out = oracle.abs() - slack
    left_out[at] = -1
    assert (oracle.abs() + slack)[at].min() >= left_out.max()
    return values


@dtypes
@product_sizes
def test_grad_weight_topk(size, dtype, generator):
    tokens, n_out, n_in = size
    g = sparse_matrix(tokens, n_out, dtype, generator)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    check_grad_weight_topk(g, x, n_out * n_in // 100 + 1)


ALIGNED_SIZES = {
    "small": (40, 24, 16),
    "small_odd": (37, 24, 16),  # tokens
    "tiles": (300, 256, 128),
    "deep": (4104, 136, 24),
    "wide": (43, 4104, 24),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("size", ALIGNED_SIZES.values(), ids=ALIGNED_SIZES)
@pytest.mark.parametrize("kept", ["none", "one", "few", "most", "all"])
def test_products_of_kept_rows_and_columns(kept, size, dtype, generator):
    """In all layouts, with NaN wherever what is left out of one factor meets the other."""
    tokens, n_out, n_in = size
    share = {"none": 0, "one": 0, "few": 0.05, "most": 0.6, "all": 1}[kept]
    rows, cols = (torch.rand(n, generator=generator) < share for n in (tokens, n_out))
    if kept == "one":
        rows[tokens // 2] = cols[n_out // 3] = True
    g = torch.randn(tokens, n_out, generator=generator).abs() + 0.1
    g = (g * rows[:, None] * cols).to(dtype)
    b, x = (torch.randn(n, n_in, generator=generator).to(dtype) for n in (n_out, tokens))
    rows, cols = (~(g == 0)).any(1), (~(g == 0)).any(0)
    b[~cols], x[~rows] = torch.nan, torch.nan
    for op, left, right in (("sparse_dense_mm", g, b), ("grad_weight_topk", g.T, x)):
        factors = left.double(), right.double().nan_to_num()
        oracle, scale = factors[0] @ factors[1], factors[0].abs() @ factors[1].abs()
        arguments = (oracle.numel(),) if op == "grad_weight_topk" else ()
        for one in ("contiguous", "transposed"):
            for other in ("contiguous", "transposed"):
                views = strided_views(put(g))[one], strided_views(put(right))[other]
                got, again = (listed(getattr(ops, op)(*views, *arguments)) for _ in range(2))
                assert_bits(again[-1], got[-1])
                assert_close(got[-1].reshape(oracle.shape), oracle, scale)


@dtypes
@sizes
@pytest.mark.parametrize("step", ["int", "float32", "int64"])
def test_sparse_adam(size, dtype, step, generator):
    arguments = adam_arguments(size, dtype, generator)
    oracle = adam_oracle(arguments, 3)
    untouched = torch.ones(size[1:], dtype=torch.bool)
    untouched[tuple(arguments[3])] = False
    for layout in ("contiguous", "transposed", "sliced"):
        state = [strided_views(put(t))[layout] for t in arguments[:3]]
        coo = [put(t) for t in arguments[3:]]
        if step == "int":
            ops.sparse_adam_(*state, *coo, *ADAM)
        else:
            op = getattr(torch.ops.sparsegrad_kernels, "_sparse_adam_tensor_step_", None)
            if op is None:
                pytest.skip("this version takes no step as a tensor")
            number = torch.tensor([3], dtype=getattr(torch, step), device=DEVICE)
            lr = torch.tensor([HYPER[0]], device=DEVICE)
            op(*state, *coo, number, lr, *HYPER[1:])
        for got, wanted, before in zip(state, oracle, arguments[:3], strict=True):
            assert_close(got, wanted, wanted.abs() + before.double().abs() + HYPER[0])
            assert_bits(got.cpu()[untouched], before[untouched])


@dtypes
@pytest.mark.parametrize("on_device", [False, True], ids=["int", "tensor"])
def test_sparse_adam_without_a_first_moment_small(dtype, on_device, generator):
    param, first, second, *coo = (put(t) for t in adam_arguments((1, 33, 50), dtype, generator))
    peers = [t.clone() for t in (param, first, second)]
    step = torch.tensor(3, device=DEVICE) if on_device else 3
    ops.sparse_adam_(*peers, *coo, step, 0.01, 0.0, 0.99, 1e-6)
    ops.sparse_adam_(param, None, second, *coo, step, 0.01, 0.0, 0.99, 1e-6)
    assert_bits(param, peers[0])
    assert_bits(second, peers[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("step", ["int", "float32", "int64"])
def test_sparse_adam_rounds_by_chance_small(dtype, step, generator):
    """A second moment of 16 bits: by the bits of the reference."""
    before = torch.rand(33, 50, generator=generator).to(dtype)
    indices = before.nonzero().T
    position = indices[0] * before.shape[1] + indices[1]
    for number in (3, 4):
        moment = strided_views(put(before))["sliced"]
        others = torch.zeros(2, *before.shape, dtype=dtype, device=DEVICE)
        now = number
        if step != "int":
            now = torch.tensor(number, dtype=getattr(torch, step), device=DEVICE)
        values = torch.zeros(indices.shape[1], dtype=dtype, device=DEVICE)
        ops.sparse_adam_(*others, moment, put(indices), values, now, 0.01, 0.9, 0.75, 1e-6)
        seed = torch.tensor([number])
        at = tuple(indices)
        wanted = round_stochastically(before[at].float() * 0.75, before[at], seed, position)
        assert_bits(moment.cpu()[at], wanted)


@dtypes
@product_sizes
@pytest.mark.parametrize("sides", ["both", "in", "out", "none"])
def test_fold(size, dtype, sides, generator):
    weight, *bases, indices, values = fold_arguments(size, dtype, generator)
    given = [b if sides in ("both", side) else None for side, b in zip(SIDES, bases, strict=True)]
    identities = [torch.eye(n, dtype=torch.float64) for n in (size[2], size[1])]
    used = [i if b is None else b for b, i in zip(given, identities, strict=True)]
    oracle, scale = fold_oracle(weight, *used, indices, values)
    for layout in ("contiguous", "transposed", "sliced"):
        target, *bases = (
            t if t is None else strided_views(put(t))[layout] for t in (weight, *given)
        )
        ops.fold_(target, *bases, put(indices), put(values))
        assert_close(target, oracle, scale, factor=2)


# [out_features, in_features] and how many vectors the bases lack: in whole vectors, and not; with
# more entries in a dense row or column than a block holds, and more sums.
DELTA_SIZES = {
    "small": (40, 24, 8),
    "small_odd": (21, 19, 3),
    "large": (536, 264, 16),
    "large_odd": (533, 261, 3),
    "wide": (24, 2088, 8),
}
delta_sizes = pytest.mark.parametrize("size", DELTA_SIZES.values(), ids=DELTA_SIZES)
all_sides = pytest.mark.parametrize("sides", ["both", "in", "out", "none"])
fold_delta = torch.ops.sparsegrad_kernels._fold_delta_


def fold_delta_arguments(
    size, dtype: torch.dtype, sides: str, keep: float, generator: torch.Generator
) -> tuple[list[Tensor | None], list[Tensor]]:
    """weight, delta, u, v, of which `sides` are given; and all four, with identities in float64."""
    n_out, n_in, cut = size
    u, v = (
        (torch.randn(n - cut, n, generator=generator) / n**0.5).to(dtype)
        if sides in ("both", side)
        else None
        for side, n in (("in", n_in), ("out", n_out))
    )
    full_u, full_v = (
        torch.eye(n, dtype=torch.float64) if basis is None else basis
        for n, basis in ((n_in, u), (n_out, v))
    )
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
    delta = sparse_matrix(full_v.shape[0], full_u.shape[0], dtype, generator, keep)
    return [weight, delta, u, v], [weight, delta, full_u, full_v]


def fold_delta_oracle(weight, delta, u, v) -> tuple[Tensor, Tensor]:
    indices = delta.nonzero().T
    return fold_oracle(weight, u, v, indices, delta[tuple(indices)])


def in_layout(t: Tensor | None, layout: str) -> Tensor | None:
    return None if t is None else strided_views(put(t))[layout]


@dtypes
@delta_sizes
@all_sides
@pytest.mark.parametrize("keep", [0.0, 0.01, 1.0], ids=["zero", "sparse", "dense"])
def test_fold_delta(keep, sides, size, dtype, generator):
    arguments, full = fold_delta_arguments(size, dtype, sides, keep, generator)
    oracle, scale = fold_delta_oracle(*full)
    for layout in ("contiguous", "transposed", "sliced"):
        weight, delta, u, v = (in_layout(t, layout) for t in arguments)
        fold_delta(weight, delta, u, v, 9, None)
        assert_close(weight, oracle, scale, factor=2)
        assert not delta.any()


@delta_sizes
@pytest.mark.parametrize("keep", [0.01, 1.0], ids=["sparse", "dense"])
def test_fold_delta_as_tf32(keep, size, generator):
    arguments, full = fold_delta_arguments(size, torch.float32, "both", keep, generator)
    oracle, scale = fold_delta_oracle(*full)
    for layout in ("contiguous", "transposed", "sliced"):
        weight, delta, u, v = (in_layout(t, layout) for t in arguments)
        with multiplied_as("tf32"):
            fold_delta(weight, delta, u, v, 9, None)
        assert_close(weight, oracle, scale, factor=4 * TF32)
        assert not delta.any()


@pytest.mark.parametrize(
    ("dtype", "delta_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", ["small", "large_odd"])
@all_sides
def test_fold_delta_in_another_dtype(sides, size, dtype, delta_dtype, generator):
    """As if it had the weight's."""
    arguments, full = fold_delta_arguments(DELTA_SIZES[size], dtype, sides, 0.01, generator)
    arguments[1] = full[1] = arguments[1].to(delta_dtype).to(dtype)  # that both can hold
    oracle, scale = fold_delta_oracle(*full)
    arguments[1] = arguments[1].to(delta_dtype)
    for layout in ("contiguous", "transposed", "sliced"):
        weight, delta, u, v = (in_layout(t, layout) for t in arguments)
        fold_delta(weight, delta, u, v, 9, None)
        assert_close(weight, oracle, scale, factor=2)
        assert delta.dtype == delta_dtype and not delta.any()


@delta_sizes
@pytest.mark.parametrize("keep", [0.0, 0.01, 1.0], ids=["zero", "sparse", "dense"])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fold_delta_in_bfloat16(delta_dtype, keep, size, generator):
    """Bases in bfloat16, weight in float32: the update alone is rounded."""
    arguments, _ = fold_delta_arguments(size, torch.float32, "both", keep, generator)
    arguments[1] = arguments[1].to(delta_dtype)
    arguments[2:] = (basis.bfloat16() for basis in arguments[2:])
    oracle, scale = fold_delta_oracle(*arguments)
    of_update = TOLERANCE[torch.bfloat16] * (scale - arguments[0].double().abs())
    limit = of_update + 2 * TOLERANCE[torch.float32] * scale
    for of_weight, of_delta, of_bases in itertools.product(
        ("contiguous", "transposed", "sliced"), repeat=3
    ):
        weight, delta = in_layout(arguments[0], of_weight), in_layout(arguments[1], of_delta)
        fold_delta(weight, delta, *(in_layout(t, of_bases) for t in arguments[2:]), 9, None)
        assert not delta.any()
        assert bool(((weight.cpu().double() - oracle).abs() <= limit).all())


@all_sides
def test_layer_folds_after_bfloat16_small(sides, generator):
    """Of a step under autocast: with both bases the update is rounded, the weight never."""
    n_out, n_in = 40, 24
    u = orthogonal(n_in, generator, torch.float32) if sides in ("both", "in") else None
    v = orthogonal(n_out, generator, torch.float32) if sides in ("both", "out") else None
    basis = None if u is None and v is None else Basis(u, v)
    layer = SparseGradLinear(n_in, n_out, basis, k=50).to(DEVICE)
    optimizer = torch.optim.SparseAdam([layer.delta], lr=1e-3)  # which leaves the fold to the layer
    x = torch.randn(16, n_in, generator=generator)
    for _ in range(2):
        before = layer.weight.detach().clone()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            layer(put(x)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        delta = layer._parameters["delta"].detach().clone()
        full_u = torch.eye(n_in).double() if u is None else u.double()
        full_v = torch.eye(n_out).double() if v is None else v.double()
        oracle, scale = fold_delta_oracle(before.cpu(), delta.cpu(), full_u, full_v)
        old = before.cpu().double().abs()
        limit = TOLERANCE[torch.bfloat16] * (scale - old) + TOLERANCE[torch.float32] * scale
        assert bool(((layer.weight.detach().cpu().double() - oracle).abs() <= limit).all())
        assert not torch.equal(layer.weight, before) and not layer._parameters["delta"].any()


@delta_sizes
@pytest.mark.parametrize("sides", ["in", "out", "none"])
def test_fold_delta_in_mixed_layouts(sides, size, generator):
    arguments, full = fold_delta_arguments(size, torch.float32, sides, 0.05, generator)
    oracle, scale = fold_delta_oracle(*full)
    layouts = ("contiguous", "transposed", "sliced")
    for of_weight, of_delta, of_basis in itertools.product(layouts, repeat=3):
        weight, delta = in_layout(arguments[0], of_weight), in_layout(arguments[1], of_delta)
        u, v = (in_layout(t, of_basis) for t in arguments[2:])
        fold_delta(weight, delta, u, v, 9, None)
        assert_close(weight, oracle, scale, factor=2)
        assert not delta.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@delta_sizes
@all_sides
def test_fold_delta_rounds_by_chance(sides, size, dtype, generator):
    arguments, full = fold_delta_arguments(size, dtype, sides, 0.01, generator)
    arguments[1][0, 0] = 1  # without entries there is nothing to round
    arguments[1] *= 2**-6  # below what rounding to nearest would keep of many
    oracle, scale = fold_delta_oracle(*full)
    # To one of the two neighbours, but for the error of the sum.
    limit = torch.finfo(dtype).eps * oracle.abs() + 1e-3 * (scale - full[0].double().abs()) + 1e-6
    results = []
    for seed in (2**40, 2**40, 7):
        weight, delta, u, v = (None if t is None else put(t) for t in arguments)
        on_device = torch.tensor([seed], device=DEVICE)
        fold_delta(weight, delta, u, v, 9, on_device)
        assert on_device.item() == seed + 1
        assert not delta.any()
        assert bool(((weight.cpu().double() - oracle).abs() <= limit).all())
        results.append(weight)
    if not is_reference("_fold_delta_"):  # whose sums torch makes, in an order of chance
        assert_bits(results[0], results[1])
    assert size[0] < 100 or not torch.equal(results[0], results[2])


def test_fold_delta_is_noticed_small(generator):
    """Autograd's versions count it, by which a layer knows that there is nothing to fold."""
    arguments, _ = fold_delta_arguments(DELTA_SIZES["small"], torch.bfloat16, "in", 0.1, generator)
    weight, delta, u, _ = (None if t is None else put(t) for t in arguments)
    seed = torch.tensor([3], device=DEVICE)
    before = [t._version for t in (weight, delta, seed)]
    fold_delta(weight, delta, u, None, 9, seed)
    assert all(t._version > n for t, n in zip((weight, delta, seed), before, strict=True))


def test_fold_delta_keeps_what_is_not_a_number_small():
    weight = torch.ones(16, 16, device=DEVICE)
    delta, u = torch.zeros_like(weight), torch.eye(16, device=DEVICE)
    delta[3, 5] = torch.nan
    fold_delta(weight, delta, u, None, 9, None)
    assert not delta.any()
    assert bool(weight[3].isnan().all())
    assert bool((weight[4:] == 1).all()) and bool((weight[:3] == 1).all())


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@all_sides
def test_fold_delta_of_nothing_small(sides, shape):
    """Without elements of W, or of delta."""
    n_out, n_in = shape
    u = torch.ones(4, n_in, device=DEVICE) if sides in ("both", "in") else None
    v = torch.ones(4, n_out, device=DEVICE) if sides in ("both", "out") else None
    weight = torch.ones(n_out, n_in, device=DEVICE)
    r_out, r_in = n_out if v is None else 4, n_in if u is None else 4
    delta = torch.ones(r_out, r_in, device=DEVICE)
    fold_delta(weight, delta, u, v, 1, None)
    assert not delta.any()
    rank_0 = [None if t is None else t[:0] for t in (u, v)]
    weight = torch.ones(8, 8, device=DEVICE)
    wide = [None if t is None else torch.ones(0, 8, device=DEVICE) for t in rank_0]
    sizes = [8 if t is None else 0 for t in wide]
    fold_delta(weight, torch.zeros(sizes[1], sizes[0], device=DEVICE), *wide, 1, None)
    assert bool((weight == 1).all())


@all_sides
def test_fold_delta_refuses_what_does_not_fit_small(sides, generator):
    skip_if_reference("_fold_delta_")
    if not ON_GPU:
        pytest.skip("the reference is told nothing wrong by its caller")
    arguments, _ = fold_delta_arguments(DELTA_SIZES["small"], torch.float32, sides, 0.1, generator)
    weight, delta, u, v = (None if t is None else put(t) for t in arguments)
    wrong = [
        (weight, delta[:-1], u, v, 9, None),
        (weight, delta[:, :-1], u, v, 9, None),
        (weight, delta.int(), u, v, 9, None),
        (weight, delta.cpu(), u, v, 9, None),
        (weight, delta[0], u, v, 9, None),
        (weight, delta, u, v, 9, torch.tensor([3], device=DEVICE)),  # float32 is not rounded
    ]
    if sides == "both":
        wrong += [
            (weight, delta, u.bfloat16(), v, 9, None),
            (weight, delta, u, v.bfloat16(), 9, None),
        ]
    elif sides != "none":  # with one basis entries are picked, not rounded
        one = [None if t is None else t.bfloat16() for t in (u, v)]
        wrong.append((weight, delta, *one, 9, None))
    before = weight.clone(), delta.clone()
    for bad in wrong:
        with pytest.raises(RuntimeError):
            fold_delta(*bad)
    assert_bits(weight, before[0])
    assert_bits(delta, before[1])


# ---- float32 as tf32 ----


def float32_product(op: str, size, layout: str, factor: float, seed: int) -> Tensor:
    """What `op` computes of random float32 matrices: right but for `factor` times the tolerance."""
    tokens, n_out, n_in = size
    generator = torch.Generator().manual_seed(seed)
    if op == "fold_":
        arguments = fold_arguments(size, torch.float32, generator)
        weight, u, v = (strided_views(put(t))[layout] for t in arguments[:3])
        ops.fold_(weight, u, v, *(put(t) for t in arguments[3:]))
        assert_close(weight, *fold_oracle(*arguments), 2 * factor)
        return weight
    a = sparse_matrix(tokens, n_out, torch.float32, generator)
    if op == "grad_weight_topk":
        x = torch.randn(tokens, n_in, generator=generator)
        left, right = strided_views(a)[layout], strided_views(x)[layout]
        return check_grad_weight_topk(left, right, n_out * n_in // 100 + 1, factor)
    b = torch.randn(n_out, n_in, generator=generator)
    left, right = (strided_views(put(t))[layout] for t in (a, b))
    oracle, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if op == "sparse_dense_mm_coo":
        rows, _ = nonzero_oracle(a, 0.0)
        _, values = ops.sparse_dense_mm_coo(left, right)
        assert_close(values, oracle[rows].reshape(-1), scale[rows].reshape(-1), factor)
        return values
    product = ops.sparse_dense_mm(left, right)
    assert_close(product, oracle, scale, factor)
    return product


@pytest.mark.parametrize(
    "op", ["sparse_dense_mm", "sparse_dense_mm_coo", "grad_weight_topk", "fold_"]
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@sizes
def test_float32_is_tf32_where_torch_may(size, layout, op, generator):
    seed = generator.initial_seed()
    before = torch.backends.cuda.matmul.fp32_precision
    with multiplied_as("ieee"):
        exact = float32_product(op, size, layout, 1, seed)
    with multiplied_as("tf32"):
        rounded = float32_product(op, size, layout, TF32, seed)
    assert torch.backends.cuda.matmul.fp32_precision == before
    skip_if_reference(op)
    with multiplied_as("ieee"):
        assert_bits(float32_product(op, size, layout, 1, seed), exact)
    if ON_GPU and op != "sparse_dense_mm_coo":  # whose product may be cuBLAS's affair
        assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@sizes
def test_products_near_a_threshold_round_alike(size, precision, generator):
    """And so the threshold decides nothing, to the bit, where the product is rounded."""
    tokens, n_out, n_in = size
    g = put(sparse_matrix(tokens, n_out, torch.float32, generator))
    x = put(torch.randn(tokens, n_in, generator=generator))
    k = n_out * n_in // 100 + 1
    threshold = torch.full((1,), torch.nan, device=DEVICE)
    with multiplied_as(precision):
        whole = ops.grad_weight_topk(g, x, k, threshold=threshold)
        near = ops.grad_weight_topk(g, x, k, threshold=threshold)
    assert_bits(near[0], whole[0])
    assert_bits(near[1], whole[1])


def test_tf32_of_what_is_not_finite_small(generator):
    a, b = torch.rand(37, 21, generator=generator), torch.rand(21, 19, generator=generator) + 1
    a[3, 4], a[5, 6] = torch.inf, torch.nan
    with multiplied_as("tf32"):
        product = ops.sparse_dense_mm(put(a), put(b)).cpu()
    assert bool((product[3] == torch.inf).all()) and bool(product[5].isnan().all())
    finite = [i for i in range(37) if i not in (3, 5)]
    oracle = a[finite].double() @ b.double()
    assert_close(product[finite], oracle, oracle, TF32)


def test_tf32_from_the_autograd_thread_small(generator):
    a = sparse_matrix(37, 21, torch.float32, generator)
    b = torch.randn(21, 19, generator=generator)
    grad = torch.randn(37, 19, generator=generator)
    left, right = (put(t).requires_grad_() for t in (a, b))
    with multiplied_as("tf32"):
        ops.sparse_dense_mm(left, right).backward(put(grad))
    assert left.grad is not None and right.grad is not None
    a, b, grad = a.double(), b.double(), grad.double()
    assert_close(left.grad, grad @ b.T, grad.abs() @ b.T.abs(), TF32)
    assert_close(right.grad, a.T @ grad, a.T.abs() @ grad.abs(), TF32)


@pytest.mark.parametrize("op", ["sparse_dense_mm", "grad_weight_topk", "fold_"])
def test_tf32_in_a_graph(op, generator):
    skip_if_reference(op)
    run, inputs, n_written = example(op, torch.float32, 0.5, generator)
    static, eager = [put(t) for t in inputs], [put(t) for t in inputs]
    with multiplied_as("tf32"):
        expected = run(*eager)
        with no_sync():
            run(*[t.clone() for t in static])
        replay = captured(lambda: run(*static))
    for tensor, value in zip(static, inputs, strict=True):
        tensor.copy_(value)
    got = replay()  # of what was captured, though the flag is off again
    if ON_GPU:
        for one, other in zip(listed(got), listed(expected), strict=True):  # type: ignore[arg-type]
            assert_bits(one, other)
        for one, other in zip(static[:n_written], eager[:n_written], strict=True):
            assert_bits(one, other)


@pytest.mark.parametrize("op", OPS)
def test_empty_small(op):
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    nothing = (zeros(2, 0, dtype=torch.int64), zeros(0))
    if op == "compact_indices":
        assert ops.compact_indices(zeros(0, 5))[2].tolist() == [0, 0]
    elif op == "topk_coo":
        assert ops.topk_coo(zeros(5, 0), 3)[0].shape == (2, 0)
    elif op == "sparse_dense_mm":
        assert_bits(ops.sparse_dense_mm(zeros(4, 0), zeros(0, 3)), zeros(4, 3))
    elif op == "grad_weight_topk":
        assert ops.grad_weight_topk(zeros(0, 4), zeros(0, 3), 5)[1].tolist() == [0.0] * 5
    elif op == "sparse_adam_":
        ops.sparse_adam_(*(zeros(3, 4) for _ in range(3)), *nothing, *ADAM)
    else:
        ops.fold_(zeros(3, 4), None, None, *nothing)


# ---- Offsets beyond 2^31 ----


def far_apart(a: Tensor) -> Tensor:
    """The same two rows, 2^31 elements from each other."""
    assert a.shape[0] == 2
    room = torch.empty(2**31 + a.shape[1], dtype=a.dtype, device=DEVICE)
    view = room.as_strided(a.shape, (2**31, 1))
    view.copy_(a)
    return view


@pytest.mark.parametrize("op", OPS)
def test_rows_far_apart(op, generator):
    free = torch.cuda.mem_get_info()[0] if ON_GPU else 2**40  # the CPU's pages are never touched
    if free < 24 << 30:
        pytest.skip("less than 24 GB of memory are free")
    if op in ("sparse_dense_mm", "grad_weight_topk"):  # cuBLAS takes no such stride
        skip_if_reference(op)
    dtype = torch.bfloat16
    a = torch.randn(2, 70, generator=generator).to(dtype)
    b = torch.randn(70, 9, generator=generator).to(dtype)
    x = torch.randn(2, 9, generator=generator).to(dtype)
    adam = adam_arguments((0, 2, 70), dtype, generator)
    indices, values = put(adam[3]), put(adam[4])
    far, near = far_apart(a), put(a)
    if op == "sparse_adam_":
        state = [far_apart(t) for t in adam[:3]]
        ops.sparse_adam_(*state, indices, values, *ADAM)
        for got, wanted in zip(state, adam_oracle(adam, 3), strict=True):
            assert_close(got, wanted, wanted.abs() + 1)
    elif op == "fold_":
        ops.fold_(far, None, None, indices, values)
        ops.fold_(near, None, None, indices, values)
        assert_bits(far, near)
    else:
        rest = {
            "compact_indices": (),
            "topk_coo": (20,),
            "sparse_dense_mm": (put(b),),
            "grad_weight_topk": (put(x), 30),
        }[op]
        got, wanted = getattr(ops, op)(far, *rest), getattr(ops, op)(near, *rest)
        for one, other in zip(listed(got), listed(wanted), strict=True):
            assert_bits(one, other)


# ---- Without waiting, in graphs, on other streams and devices ----


def listed(value: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


Run = Callable[..., Tensor | tuple[Tensor, ...] | None]


def fold_delta_example(sides: str, dtype: torch.dtype, keep: float, generator: torch.Generator):
    arguments, _ = fold_delta_arguments(DELTA_SIZES["large"], dtype, sides, keep, generator)
    given = [t is not None for t in arguments]

    def run(*tensors: Tensor) -> None:
        rest = iter(tensors)
        fold_delta(*(next(rest) if one else None for one in given), 9, None)

    return run, [t for t in arguments if t is not None], 2


def example(op: str, dtype: torch.dtype, keep: float, generator: torch.Generator):
    """How to run `op`, its inputs, and how many of the first of them it writes."""
    if op.startswith("_fold_delta_"):
        return fold_delta_example(op.partition(" ")[2], dtype, keep**4, generator)
    size = SIZES["large"]
    run: Run = getattr(ops, op.partition(" ")[0], token_products)
    if op == "sparse_adam_":
        return lambda *t: ops.sparse_adam_(*t, *ADAM), adam_arguments(size, dtype, generator), 3
    if op == "fold_":
        return run, fold_arguments(size, dtype, generator), 1
    if op in ("fold_ u", "fold_ v"):
        weight, u, v, *coo = fold_arguments(size, dtype, generator)
        if op == "fold_ u":
            return lambda w, u, *coo: ops.fold_(w, u, None, *coo), [weight, u, *coo], 1
        return lambda w, v, *coo: ops.fold_(w, None, v, *coo), [weight, v, *coo], 1
    a = sparse_matrix(*size[:2], dtype, generator, keep)
    other = torch.randn(size[0], 261, generator=generator).to(dtype)
    if op == "grad_weight_topk":
        return lambda *t: ops.grad_weight_topk(*t, 500), [a, other], 0
    weight = torch.randn(size[1], 261, generator=generator).to(dtype)
    if op == "sparse_dense_mm":
        return run, [a, weight], 0
    if op == "_token_products":
        return lambda *t: token_products(*t, True), [a, other, weight], 0
    if op == "topk_coo near":
        c, threshold = weight @ other[:261].T, torch.tensor([20.0])
        return lambda *t: ops.topk_coo(t[1], 500, t[0]), [threshold, c], 1
    return (run if op == "compact_indices" else lambda t: ops.topk_coo(t, 500)), [a], 0


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """What replays `run` and returns what it returned, in the same memory."""
    if not ON_GPU:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, tunes and allocates what a capture must not
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> object:
        graph.replay()
        return out

    return replay


few = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
FOLDS = [f"_fold_delta_ {sides}" for sides in ("both", "in", "out", "none")]
each_op = pytest.mark.parametrize("op", [*OPS, *VARIANTS, *FOLDS])


@few
@each_op
def test_never_waits(op, dtype, generator):
    skip_if_reference(op)
    run, inputs, _ = example(op, dtype, 0.5, generator)
    on_device = [put(t) for t in inputs]
    run(*on_device)  # compiles and tunes
    with no_sync():
        run(*on_device)


@dtypes
@pytest.mark.parametrize("in_graph", [False, True], ids=["small", "graph"])
def test_threshold_is_judged_on_the_device(in_graph, dtype, generator):
    """It serves, lets too many through or too few, or is none. Sums are exact."""
    skip_if_reference("_grad_weight_topk_near")
    tokens, n_out, n_in, k = 64, 130, 150, 10
    g, x = (torch.randint(-1, 2, (tokens, n), generator=generator) for n in (n_out, n_in))
    g[::3], g[:, ::5] = 0, 0
    product = (g.T @ x).to(dtype)
    threshold = torch.full((1,), torch.nan, device=DEVICE)
    static = put(g.to(dtype)), put(x.to(dtype))

    def run() -> tuple[Tensor, Tensor]:
        return ops.grad_weight_topk(*static, k, threshold=threshold)

    run()  # compiles and tunes
    with no_sync():
        run()
    replay = captured(run) if in_graph else run
    for scale in (1, 1, 8, 8, 0.125, 0.125, 0, 1, 1):
        static[0].copy_((g * scale).to(dtype))
        indices, values = listed(replay())  # type: ignore[arg-type]
        wanted = product * scale
        chosen = topk_oracle(wanted, k)
        assert_bits(indices, torch.stack([chosen // n_in, chosen % n_in]))
        torch.testing.assert_close(values.cpu(), wanted.reshape(-1)[chosen], rtol=0, atol=0)
        least = wanted.reshape(-1)[chosen].abs().amin()
        torch.testing.assert_close(threshold.cpu(), SLACK * least.float()[None])


@few
@each_op
def test_graph_follows_its_inputs(op, dtype, generator):
    """One capture, replayed on other values, with more nonzero rows and with fewer."""
    skip_if_reference(op)
    run, first, n_written = example(op, dtype, 0.3, generator)
    _, second, _ = example(op, dtype, 0.8, generator)
    static = [put(t) for t in first]
    replay = captured(lambda: run(*static))
    for inputs in (second, first, second):
        for tensor, value in zip(static, inputs, strict=True):
            tensor.copy_(value)
        got = replay()
        eager = [put(t) for t in inputs]
        expected = run(*eager)
        for one, other in zip(listed(got), listed(expected), strict=True):  # type: ignore[arg-type]
            assert_bits(one, other)
        for one, other in zip(static[:n_written], eager[:n_written], strict=True):
            assert_bits(one, other)


@each_op
def test_runs_on_the_current_stream(op, generator):
    """A kernel on another stream would not wait for its input, nor its output for it."""
    if op.startswith("_fold_delta_"):  # whose reference adds in an order of chance
        skip_if_reference(op)
    run, inputs, n_written = example(op, torch.float32, 0.5, generator)
    expected_state = [put(t) for t in inputs]
    expected = listed(run(*expected_state))
    state = [torch.zeros_like(t, device=DEVICE) for t in inputs]
    sources = [put(t) for t in inputs]
    if ON_GPU:
        torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else no_sync():
        if ON_GPU:
            torch.cuda._sleep(50_000_000)  # cycles: the inputs come late
        for tensor, value in zip(state, sources, strict=True):
            tensor.copy_(value)
        got = listed(run(*state))
        for one, other in zip(got, expected, strict=True):
            assert_bits(one, other)
        for one, other in zip(state[:n_written], expected_state[:n_written], strict=True):
            assert_bits(one, other)


@each_op
def test_runs_on_its_tensors_device(op, generator):
    """Which need not be the current one."""
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    device = torch.device("cuda:1") if ON_GPU else DEVICE
    run, inputs, n_written = example(op, torch.float32, 0.5, generator)
    here, there = [put(t) for t in inputs], [t.to(device) for t in inputs]
    expected, got = listed(run(*here)), listed(run(*there))
    pairs = [*zip(got, expected, strict=True)]
    for one, other in [*pairs, *zip(there[:n_written], here[:n_written], strict=True)]:
        assert one.device == device
        assert_bits(one, other)


# ---- All together ----


@pytest.mark.parametrize("sides", ["both", "in", "out", "none"])
def test_training_equals_that_on_the_cpu(sides, generator):
    n_in, n_out = 24, 40
    spectra = torch.ones(n_in), torch.ones(n_out)
    u, v = orthogonal(n_in, generator), orthogonal(n_out, generator)
    weights = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
    batches = [torch.randn(3, 11, n_in, generator=generator, dtype=torch.float64) for _ in range(6)]
    outcomes = []
    for device in (torch.device("cpu"), DEVICE):
        linear = torch.nn.Linear(n_in, n_out, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(weights)
            linear.bias.zero_()
        basis = None
        if sides != "none":
            wanted = sides in ("both", "in"), sides in ("both", "out")
            basis = Basis(u, v, *spectra).select(*wanted)
        layer = SparseGradLinear.from_linear(linear.to(device), basis, density=0.1)
        optimizer = SparseAdam(layer.parameters(), lr=1e-2)
        for x in batches:
            x = x.to(device).requires_grad_()
            out = layer(x)
            mask = torch.arange(11, device=device) < 7  # the rest is padding
            (out.square() * mask[:, None]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(layer.to_linear().weight.detach().cpu())
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(outcomes[0], weights)
