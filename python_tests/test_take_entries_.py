from __future__ import annotations

import pytest
import torch

from cases import DTYPES, SHAPES, sparse_matrix, strided_views
from sparsegrad_kernels.ops.take_entries_ import take_entries_

OP = torch.ops.sparsegrad_kernels._take_entries_.default


@pytest.mark.parametrize("shape", [*SHAPES, (700, 900)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0.05, 1.0])
def test_equals_nonzero(shape, dtype, keep, generator):
    a = sparse_matrix(*shape, dtype, generator, keep)
    a *= torch.rand(*shape, generator=generator) < keep
    wanted = a.nonzero().T
    for layout in ("contiguous", "transposed", "sliced"):
        view = strided_views(a.clone())[layout]
        indices, values = take_entries_(view)
        assert indices.dtype == torch.int64 and values.dtype == dtype
        assert torch.equal(indices, wanted), layout
        assert torch.equal(values, a[tuple(wanted)])
        assert not view.any()
    wide = torch.full((2 * shape[0] + 1, 3 * shape[1] + 2), torch.nan, dtype=dtype)
    taken = wide[1 : 2 * shape[0] + 1 : 2, 2 : 3 * shape[1] + 2 : 3]
    taken.copy_(a)
    take_entries_(taken)
    taken.fill_(torch.nan)
    assert wide.isnan().all()  # what lies between the elements is not touched


def test_special_values():
    a = torch.zeros(5, 4)
    a[1, 0] = torch.nan
    a[2, 1] = -0.0
    a[3, 2] = 1e-45  # the smallest denormal
    a[4, 3] = -torch.inf
    indices, values = take_entries_(a)
    assert indices.tolist() == [[1, 3, 4], [0, 2, 3]]
    assert values[0].isnan() and values[1] == 1e-45 and values[2] == -torch.inf
    assert (a == 0).all()


def test_autograd_counts_it():
    a = torch.ones(3, 4)
    before = a._version
    take_entries_(a)
    assert a._version > before
    leaf = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError):
        take_entries_(leaf)
    assert (leaf == 1).all()


def test_opcheck(generator):
    torch.library.opcheck(OP, (sparse_matrix(7, 9, torch.float32, generator),))
