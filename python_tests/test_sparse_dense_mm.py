from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import (
    DTYPES,
    INTERPRETING,
    SHAPES,
    assert_close_to,
    examples,
    oracle_rows_cols,
    sparse_matrix,
    strided_views,
)
from sparsegrad_kernels.ops import sparse_dense_mm, sparse_dense_mm_coo

OPS = torch.ops.sparsegrad_kernels


def check(a: torch.Tensor, b: torch.Tensor, tol: float = 0.0) -> None:
    rows, cols = (torch.tensor(each, dtype=torch.int64) for each in oracle_rows_cols(a, tol))
    left, right = torch.zeros(a.shape, dtype=torch.float64), b.double()
    left[rows[:, None], cols] = a.double()[rows[:, None], cols]
    oracle, scale = left @ right, left.abs() @ right.abs()
    product = sparse_dense_mm(a, b, tol)
    assert product.dtype == a.dtype
    assert_close_to(product, oracle, scale)
    indices, values = sparse_dense_mm_coo(a, b, tol)
    wanted = torch.cartesian_prod(rows, torch.arange(b.shape[1])).reshape(-1, 2).T
    assert torch.equal(indices, wanted)
    assert_close_to(values, oracle[rows].reshape(-1), scale[rows].reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [0.0, 0.75])  # exact in every dtype: the oracle rounds none
@pytest.mark.parametrize("d", [13, 0] if INTERPRETING else [1, 13, 0])
def test_equals_oracle(shape, dtype, tol, d, generator):
    a = sparse_matrix(*shape, dtype, generator)
    b = torch.randn(shape[1], d, generator=generator).to(dtype)
    for left, right in zip(strided_views(a).values(), strided_views(b).values(), strict=True):
        check(left, right, tol)


@settings(max_examples=examples(100), deadline=None)
@given(
    b=st.integers(0, 30),
    c=st.integers(0, 30),
    d=st.integers(0, 30),
    keep=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_property(b, c, d, keep, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    check(
        sparse_matrix(b, c, dtype, generator, keep),
        torch.randn(c, d, generator=generator).to(dtype),
    )


def test_long_sum_is_accumulated_in_float32():
    ones = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert sparse_dense_mm(ones, ones.T.contiguous()).tolist() == [[4096.0] * 2] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_long_sums(dtype, generator):
    """Where kernels split the sums; of 70 rows more than a tile's are zero."""
    a = sparse_matrix(70, 1100, dtype, generator, 0.3)
    b = torch.randn(1100, 13, generator=generator).to(dtype)
    check(a, b)
    assert torch.equal(sparse_dense_mm(a, b), sparse_dense_mm(a, b))


def test_zero_rows_do_not_meet_infinities():
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0], [torch.inf]])
    assert sparse_dense_mm(a, b).tolist() == [[0.0], [2.0]]


def test_nan_is_seen():
    a = torch.tensor([[0.0, torch.nan], [1.0, 0.0]])
    result = sparse_dense_mm(a, torch.ones(2, 1))
    assert result[0].isnan().all()


def test_gradcheck(generator):
    a = sparse_matrix(5, 4, torch.float64, generator).requires_grad_()
    b = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    a.data[0, 0] = 1.0
    # At a zero row the gradient is that of a @ b, and finite differences leave the zero: both hold.
    assert torch.autograd.gradcheck(sparse_dense_mm, (a, b))


def test_autocast_leaves_the_dtype(generator):
    a = sparse_matrix(8, 8, torch.float32, generator, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sparse_dense_mm(a, a)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sparse_dense_mm(a, a))


@pytest.mark.parametrize("op", [sparse_dense_mm, sparse_dense_mm_coo])
def test_bad_input(op):
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"b must have as many rows as a has columns, 3, got"):
        op(a, torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"b must have the dtype of a, torch.float32, got"):
        op(a, torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match="b must be on the device of a, cpu, got meta"):
        op(a, torch.zeros(3, 2, device="meta"))
    with pytest.raises(ValueError, match="tol must be finite"):
        op(a, torch.zeros(3, 2), float("nan"))


def test_opcheck(generator):
    a = sparse_matrix(9, 6, torch.float32, generator)
    b = torch.randn(6, 4, generator=generator)
    torch.library.opcheck(OPS.sparse_dense_mm.default, (a, b, 0.0))
    torch.library.opcheck(
        OPS.sparse_dense_mm.default, (a.clone().requires_grad_(), b.clone().requires_grad_(), 0.0)
    )
    torch.library.opcheck(OPS.sparse_dense_mm_coo.default, (a, b, 0.1))


def test_compile(generator):
    a = sparse_matrix(9, 6, torch.float32, generator)
    b = torch.randn(6, 4, generator=generator)

    def use(a, b):
        indices, values = sparse_dense_mm_coo(a, b)
        return sparse_dense_mm(a, b) + 1, indices * 2, values * 2

    for got, wanted in zip(torch.compile(use, fullgraph=True)(a, b), use(a, b), strict=True):
        torch.testing.assert_close(got, wanted)
