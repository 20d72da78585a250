"""What a PyTorch user would write instead of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def any_nonzero(a: Tensor) -> tuple[Tensor, Tensor]:
    mask = a != 0
    return mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]


def two_nonzero(a: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = a.nonzero(as_tuple=True)
    return rows.unique(), cols.unique()


def any_nonzero_static(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without a host sync: padded with -1."""
    mask = a != 0
    rows, cols = mask.any(1), mask.any(0)
    counts = torch.stack([rows.sum(), cols.sum()])
    return (
        torch.nonzero_static(rows, size=rows.shape[0])[:, 0],
        torch.nonzero_static(cols, size=cols.shape[0])[:, 0],
        counts,
    )


def torch_topk(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = c.flatten()
    linear = flat.abs().topk(k, sorted=False).indices.sort().values
    return torch.stack([linear // c.shape[1], linear % c.shape[1]]), flat[linear]


def numpy_argpartition(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import numpy

    magnitude = numpy.abs(c.numpy()).ravel()
    linear = torch.from_numpy(numpy.argpartition(magnitude, -k)[-k:]).sort().values
    return torch.stack([linear // c.shape[1], linear % c.shape[1]]), c.flatten()[linear]


def select_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The rows of `a` that hold anything, times `b`, scattered into zeros."""
    rows = (a != 0).any(1).nonzero()[:, 0]
    return a.new_zeros(a.shape[0], b.shape[1]).index_copy_(0, rows, a.index_select(0, rows) @ b)


def select_matmul_topk(g: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = (g != 0).any(1).nonzero()[:, 0]
    return torch_topk(g.index_select(0, rows).T @ x.index_select(0, rows), k)
