from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, SHAPES, examples, oracle_rows_cols, sparse_matrix, strided_views
from sparsegrad_kernels.ops import compact_indices, nonzero_rows_cols

OPS = torch.ops.sparsegrad_kernels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [0.0, 0.5])
def test_equals_oracle(shape, dtype, tol, generator):
    a = sparse_matrix(*shape, dtype, generator)
    rows, cols = oracle_rows_cols(a, tol)
    for layout, view in strided_views(a).items():
        got_rows, got_cols = nonzero_rows_cols(view, tol)
        assert got_rows.dtype == got_cols.dtype == torch.int64
        assert (got_rows.tolist(), got_cols.tolist()) == (rows, cols), layout


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [0.0, 0.5])
def test_compact_equals_padded(shape, dtype, tol, generator):
    a = sparse_matrix(*shape, dtype, generator)
    for layout, view in strided_views(a).items():
        wanted = nonzero_rows_cols(view, tol)
        rows, cols, counts = compact_indices(view, tol)
        assert counts.dtype == rows.dtype == cols.dtype == torch.int32
        assert counts.tolist() == [len(wanted[0]), len(wanted[1])], layout
        for padded, short in zip((rows, cols), wanted, strict=True):
            assert padded[: len(short)].tolist() == short.tolist()
            assert (padded[len(short) :] == -1).all()
        assert (rows.shape[0], cols.shape[0]) == shape


def test_special_values():
    a = torch.zeros(6, 4)
    a[1, 0] = torch.nan
    a[2, 1] = -0.0
    a[3, 2] = 1e-45  # the smallest denormal
    a[4, 3] = -torch.inf
    assert [t.tolist() for t in nonzero_rows_cols(a)] == [[1, 3, 4], [0, 2, 3]]
    assert [t.tolist() for t in nonzero_rows_cols(a, 0.1)] == [[1, 4], [0, 3]]
    assert [t.tolist() for t in nonzero_rows_cols(a, 1e38)] == [[1, 4], [0, 3]]


def test_tol_is_exclusive():
    a = torch.tensor([[0.5, 0.25], [0.25, 0.0]])
    assert [t.tolist() for t in nonzero_rows_cols(a, 0.25)] == [[0], [0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [0.1, 0.3, 1e-3, 1e-300])
def test_tol_is_rounded_to_the_dtype(dtype, tol):
    at = torch.tensor(tol, dtype=dtype)
    above = torch.nextafter(at, torch.ones_like(at)) if dtype.itemsize > 2 else at * 1.02
    a = torch.zeros(3, 3, dtype=dtype)
    a[0, 1], a[2, 0] = -at, -above
    if above == 0:
        above = a[2, 0] = torch.tensor(1e-3, dtype=dtype)
    assert [t.tolist() for t in nonzero_rows_cols(a, tol)] == [[2], [0]]


def test_more_than_one_block_of_flags(generator):
    a = torch.zeros(3, 9000)
    a[1, torch.randint(0, 9000, (50,), generator=generator)] = 1.0
    wanted = oracle_rows_cols(a)
    for view in (a, a.T.contiguous().T):
        assert tuple(t.tolist() for t in nonzero_rows_cols(view)) == wanted
        rows, cols, counts = compact_indices(view)
        assert (rows.tolist(), counts.tolist()) == ([1, -1, -1], [1, len(wanted[1])])
        assert cols.tolist() == wanted[1] + [-1] * (9000 - len(wanted[1]))


@settings(max_examples=examples(100), deadline=None)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 40),
    keep=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
)
def test_property(rows, cols, keep, dtype, seed, layout):
    a = sparse_matrix(rows, cols, dtype, torch.Generator().manual_seed(seed), keep)
    got = nonzero_rows_cols(strided_views(a)[layout])
    assert tuple(t.tolist() for t in got) == oracle_rows_cols(a)


@pytest.mark.parametrize("op", [nonzero_rows_cols, compact_indices])
def test_bad_input(op):
    with pytest.raises(TypeError, match="a must be a torch.Tensor, got list"):
        op([[1.0]])
    with pytest.raises(TypeError, match=r"a must be float32.* got torch.int64"):
        op(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"a must have 2 dimensions, got shape \(2, 2, 2\)"):
        op(torch.zeros(2, 2, 2))
    with pytest.raises(TypeError, match="a must be a dense"):
        op(torch.zeros(2, 2).to_sparse())
    for tol in (float("nan"), -1.0, float("inf")):
        with pytest.raises(ValueError, match="tol must be finite and not negative"):
            op(torch.zeros(2, 2), tol)
    with pytest.raises(TypeError, match="tol must be a number, got str"):
        op(torch.zeros(2, 2), "0")


@pytest.mark.parametrize("tol", [0.0, 0.3])
def test_opcheck(tol, generator):
    a = sparse_matrix(9, 6, torch.float32, generator)
    torch.library.opcheck(OPS.nonzero_rows_cols.default, (a, tol))
    torch.library.opcheck(OPS.compact_indices.default, (a.T, tol))


def test_compile(generator):
    a = sparse_matrix(9, 6, torch.float32, generator)

    def use(a):
        rows, cols = nonzero_rows_cols(a)
        padded, _, counts = compact_indices(a)
        return rows * 2, cols + 1, padded + counts[0]

    for got, wanted in zip(torch.compile(use, fullgraph=True)(a), use(a), strict=True):
        assert torch.equal(got, wanted)
