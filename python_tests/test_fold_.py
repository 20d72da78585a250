from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, assert_close_to, orthogonal, strided_views
from sparsegrad_kernels.ops import fold_

OP = torch.ops.sparsegrad_kernels.fold_.default


def make(out, in_, r_out, r_in, n, dtype, generator):
    weight = torch.randn(out, in_, generator=generator).to(dtype)
    u, v = orthogonal(in_, generator)[:r_in], orthogonal(out, generator)[:r_out]
    # With replacement: entries given twice are summed.
    rows = torch.randint(r_out, (n,), generator=generator)
    cols = torch.randint(r_in, (n,), generator=generator)
    values = torch.randn(n, generator=generator).to(dtype)
    return weight, u.to(dtype), v.to(dtype), torch.stack([rows, cols]), values


def check(weight, u, v, indices, values, layout: str) -> None:
    identity = u is None
    u64 = torch.eye(weight.shape[1], dtype=torch.float64) if identity else u.double()
    v64 = torch.eye(weight.shape[0], dtype=torch.float64) if identity else v.double()
    d = torch.zeros(v64.shape[0], u64.shape[0], dtype=torch.float64)
    d.index_put_((indices[0], indices[1]), values.double(), accumulate=True)
    oracle = weight.double() + v64.T @ d @ u64
    scale = weight.double().abs() + v64.abs().T @ d.abs() @ u64.abs()
    if identity:  # summed one by one in the weight's dtype
        scale = scale + values.double().abs().sum()
    target = strided_views(weight)[layout]
    fold_(target, u, v, indices, values)
    assert_close_to(target, oracle, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (12, 5, 12, 5), (5, 12, 3, 7), (30, 20, 30, 4)])
@pytest.mark.parametrize("n", [0, 1, 40])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_equals_oracle(dtype, size, n, layout, generator):
    weight, u, v, indices, values = make(*size, n, dtype, generator)
    check(weight, strided_views(u)[layout], strided_views(v)[layout], indices, values, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity(dtype, generator):
    weight, _, _, indices, values = make(9, 7, 9, 7, 30, dtype, generator)
    check(weight, None, None, indices, values, "contiguous")


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 24),
    in_=st.integers(1, 24),
    share=st.floats(0.05, 1),
    n=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_property(out, in_, share, n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    r_out, r_in = max(1, int(share * out)), max(1, int(share * in_))
    check(*make(out, in_, r_out, r_in, n, dtype, generator), "contiguous")


def test_does_not_write_the_basis(generator):
    weight, u, v, indices, values = make(8, 6, 8, 6, 9, torch.float32, generator)
    copies = [t.clone() for t in (u, v, indices, values)]
    fold_(weight, u, v, indices, values)
    for tensor, copy in zip((u, v, indices, values), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_bad_input():
    w, u, v = torch.zeros(3, 2), torch.eye(2), torch.eye(3)
    i, x = torch.tensor([[2], [1]]), torch.ones(1)
    with pytest.raises(ValueError, match="u and v must both be given, or both be None"):
        fold_(w, u, None, i, x)
    with pytest.raises(ValueError, match=r"v must have 3 columns for weight \(3, 2\)"):
        fold_(w, u, torch.eye(4), i, x)
    with pytest.raises(TypeError, match="u must have the dtype of weight"):
        fold_(w, u.double(), v, i, x)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 2\) x \[0, 2\)"):
        fold_(w, u, v[:2], i, x)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\) x \[0, 2\)"):
        fold_(w, None, None, torch.tensor([[3], [0]]), x)
    assert (w == 0).all()


def test_opcheck(generator):
    weight, u, v, indices, values = make(8, 6, 5, 4, 9, torch.float32, generator)
    torch.library.opcheck(OP, (weight, u, v, indices, values))
    torch.library.opcheck(OP, (weight, None, None, indices, values))


def test_compile(generator):
    weight, u, v, indices, values = make(8, 6, 5, 4, 9, torch.float32, generator)
    copy = weight.clone()

    def use(weight):
        fold_(weight, u, v, indices, values)
        return weight * 2

    torch.testing.assert_close(torch.compile(use, fullgraph=True)(weight), use(copy))
    torch.testing.assert_close(weight, copy)
