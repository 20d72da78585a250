from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import (
    DTYPES,
    INTERPRETING,
    TOLERANCE,
    examples,
    oracle_topk,
    sparse_matrix,
    strided_views,
)
from sparsegrad_kernels.ops import grad_weight_topk
from sparsegrad_kernels.ops.topk_coo import SLACK

OP = torch.ops.sparsegrad_kernels.grad_weight_topk.default
NEAR = torch.ops.sparsegrad_kernels._grad_weight_topk_near.default


def check(g: torch.Tensor, x: torch.Tensor, k: int, tol: float = 0.0) -> None:
    """Each entry is right, and none that was left out is larger, beyond rounding."""
    left = g.double() * ~(g.double().abs() <= tol).all(1, keepdim=True)
    left = left * ~(g.double().abs() <= tol).all(0)
    oracle, scale = left.T @ x.double(), left.abs().T @ x.double().abs()
    indices, values = grad_weight_topk(g, x, k, tol)
    k = min(k, oracle.numel())
    assert indices.shape == (2, k)
    linear = indices[0] * max(x.shape[1], 1) + indices[1]
    assert (linear[1:] > linear[:-1]).all()
    slack = TOLERANCE[g.dtype] * scale
    error = (values.double() - oracle[indices[0], indices[1]]).abs()
    assert (error <= slack[indices[0], indices[1]]).all()
    if k:
        left_out = oracle.abs() - slack
        left_out[indices[0], indices[1]] = -1
        smallest = (oracle.abs() + slack)[indices[0], indices[1]].min()
        assert smallest >= left_out.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 9, 7), (5, 33, 12), (0, 4, 3), (4, 0, 3)])
@pytest.mark.parametrize("k", [1, 20, 10**6])
def test_equals_oracle(dtype, shape, k, generator):
    t, n_out, n_in = shape
    g = sparse_matrix(t, n_out, dtype, generator)
    x = torch.randn(t, n_in, generator=generator).to(dtype)
    for left, right in zip(strided_views(g).values(), strided_views(x).values(), strict=True):
        check(left, right, k)
        check(left, right, k, tol=0.75)  # exact in every dtype: the oracle rounds none


@settings(max_examples=examples(100), deadline=None)
@given(
    t=st.integers(0, 30),
    n_out=st.integers(0, 20),
    n_in=st.integers(0, 20),
    k=st.integers(1, 500),
    keep=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_property(t, n_out, n_in, k, keep, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    g = sparse_matrix(t, n_out, dtype, generator, keep)
    check(g, torch.randn(t, n_in, generator=generator).to(dtype), k)


def test_zero_gradient_selects_the_first_entries():
    indices, values = grad_weight_topk(torch.zeros(5, 3), torch.ones(5, 2), 3)
    assert indices.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert values.tolist() == [0.0, 0.0, 0.0]


def test_bad_input():
    g = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"x must have the 4 tokens of g, got \(5, 2\)"):
        grad_weight_topk(g, torch.zeros(5, 2), 1)
    with pytest.raises(TypeError, match="x must have the dtype of g"):
        grad_weight_topk(g, torch.zeros(4, 2).half(), 1)
    with pytest.raises(ValueError, match="k must be at least 1, got -3"):
        grad_weight_topk(g, torch.zeros(4, 2), -3)
    with pytest.raises(ValueError, match="tol must be finite"):
        grad_weight_topk(g, torch.zeros(4, 2), 1, float("nan"))


def integers(t: int, n_out: int, n_in: int, dtype: torch.dtype, generator: torch.Generator):
    """`g`, `x` and their product, which every way of adding up gives to the bit; with many ties."""
    g = torch.randint(-3, 4, (t, n_out), generator=generator)
    g[::3] = 0
    g[:, ::5] = 0
    x = torch.randint(-2, 3, (t, n_in), generator=generator)
    return g.to(dtype), x.to(dtype), (g.double().T @ x.double()).to(dtype)


def check_threshold(g, x, k: int, product: torch.Tensor, threshold: torch.Tensor) -> None:
    indices, values = grad_weight_topk(g, x, k, threshold=threshold)
    wanted_indices, wanted = oracle_topk(product, k)
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
    magnitude = wanted.abs().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    torch.testing.assert_close(threshold, SLACK * magnitude.amin()[None])


STARTS = [torch.nan, -1.0, 0.0, 1e-30, 1e-8, 4.0, 9.0, 60000.0, 3e38, torch.inf]
if INTERPRETING:  # one of each case: no threshold, all, some or none reach it, too large for it
    STARTS = [torch.nan, 1e-8, 9.0, 60000.0, torch.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", STARTS)
def test_threshold_never_decides(dtype, start, generator):
    g, x, product = integers(30, 70, 90, dtype, generator)
    threshold = torch.tensor([start])
    for k in (1, 63):
        check_threshold(g, x, k, product, threshold)  # as it starts, then as the other k left it


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_of_views(dtype, generator):
    g, x, product = integers(9, 33, 70, dtype, generator)
    threshold = torch.full((1,), torch.nan)
    for left, right in zip(strided_views(g).values(), strided_views(x).values(), strict=True):
        check_threshold(left, right, 40, product, threshold)


def test_threshold_is_carried_from_step_to_step(generator):
    threshold = torch.full((1,), torch.nan)
    for scale in (1.0, 1.25, 1.0, 64.0, 1 / 64, 0.0, 1.0):
        g, x, product = integers(20, 40, 50, torch.float32, generator)
        check_threshold(g * scale, x, 20, product * scale, threshold)


def test_threshold_with_nan_and_infinity(generator):
    threshold = torch.full((1,), torch.nan)
    for bad in (torch.nan, torch.inf):
        g, x, _ = integers(20, 40, 50, torch.float32, generator)
        for _ in range(2):
            # One bad token and output: a row of the product is NaN, or infinite.
            g[1, 7] = bad
            x[1] = 1
            x[:, 3] = 2
            kept = ~(g == 0).all(1)
            product = g[kept].T @ x[kept]
            for k in (20, 70):
                check_threshold(g, x, k, product, threshold)


def test_threshold_keeps_what_it_was_when_nothing_is_selected():
    threshold = torch.tensor([3.0])
    grad_weight_topk(torch.zeros(4, 0), torch.zeros(4, 2), 1, threshold=threshold)
    assert threshold.item() == 3.0
    grad_weight_topk(torch.ones(4, 1), torch.ones(4, 2), 9, threshold=threshold)
    assert threshold.item() == torch.tensor(SLACK * 4.0).item()


@pytest.mark.skipif(not INTERPRETING, reason="of the Triton kernels, in their interpreter")
def test_dense_product_is_made_only_where_the_threshold_does_not_serve(generator, monkeypatch):
    from sparsegrad_kernels._triton import grad_weight_topk as kernels

    made = []

    def poisoned(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made.append(g.new_full((g.shape[1], x.shape[1]), 12345.0))
        return made[-1]

    monkeypatch.setattr(kernels, "_dense_buffer", poisoned)
    g, x, product = integers(20, 70, 90, torch.float32, generator)
    threshold = torch.full((1,), torch.nan)
    for served, scale in ((False, 1), (True, 1), (True, 1), (False, 0.25), (True, 0.25)):
        check_threshold(g * scale, x, 40, product * scale, threshold)
        wanted = torch.full_like(product, 12345.0) if served else product * scale
        assert torch.equal(made[-1], wanted)
    monkeypatch.setattr(kernels, "room", lambda numel, k: k)  # no room for what passes
    check_threshold(g, x, 40, product, threshold)
    assert torch.equal(made[-1], product)


def test_bad_threshold():
    g, x = torch.ones(4, 3), torch.ones(4, 2)
    with pytest.raises(TypeError, match="threshold must be float32, got torch.float64"):
        grad_weight_topk(g, x, 1, threshold=torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"threshold must have shape \(1,\)"):
        grad_weight_topk(g, x, 1, threshold=torch.ones(2))
    with pytest.raises(ValueError, match="threshold must be on the device of g, cpu, got meta"):
        grad_weight_topk(g, x, 1, threshold=torch.ones(1, device="meta"))


def test_opcheck(generator):
    g = sparse_matrix(9, 6, torch.float32, generator)
    x = torch.randn(9, 4, generator=generator)
    torch.library.opcheck(OP, (g, x, 5, 0.0))
    torch.library.opcheck(NEAR, (g, x, 5, 0.0, torch.full((1,), torch.nan)))


def test_compile(generator):
    g = sparse_matrix(9, 6, torch.float32, generator)
    x = torch.randn(9, 4, generator=generator)

    def use(g, x):
        indices, values = grad_weight_topk(g, x, 5)
        return indices + 1, values * 2

    for got, wanted in zip(torch.compile(use, fullgraph=True)(g, x), use(g, x), strict=True):
        torch.testing.assert_close(got, wanted)
