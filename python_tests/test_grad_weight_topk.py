from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, TOLERANCE, sparse_matrix, strided_views
from sparsegrad_kernels.ops import grad_weight_topk

OP = torch.ops.sparsegrad_kernels.grad_weight_topk.default


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
        check(left, right, k, tol=0.7)


@settings(max_examples=100, deadline=None)
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


def test_opcheck(generator):
    g = sparse_matrix(9, 6, torch.float32, generator)
    torch.library.opcheck(OP, (g, torch.randn(9, 4, generator=generator), 5, 0.0))


def test_compile(generator):
    g = sparse_matrix(9, 6, torch.float32, generator)
    x = torch.randn(9, 4, generator=generator)

    def use(g, x):
        indices, values = grad_weight_topk(g, x, 5)
        return indices + 1, values * 2

    for got, wanted in zip(torch.compile(use, fullgraph=True)(g, x), use(g, x), strict=True):
        torch.testing.assert_close(got, wanted)
