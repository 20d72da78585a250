"""Sparse-by-dense product as COO, eq. 2: `C_coo[rows[k], l] = C[k, l]`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define
from .sparse_dense_mm import check_product, compacted_product


def _reference(a: Tensor, b: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    rows, c = compacted_product(a, b, tol)
    columns = torch.arange(c.shape[1], device=c.device)
    indices = torch.stack([rows.repeat_interleave(c.shape[1]), columns.repeat(c.shape[0])])
    return indices, c.reshape(-1)


def _fake(a: Tensor, b: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size() * b.shape[1]
    return a.new_empty((2, n), dtype=torch.int64), a.new_empty(n)


_op = define(
    "sparse_dense_mm_coo(Tensor a, Tensor b, float tol) -> (Tensor, Tensor)", _reference, _fake
)


def sparse_dense_mm_coo(a: Tensor, b: Tensor, tol: float = 0.0) -> tuple[Tensor, Tensor]:
    """`a @ b` as COO without the rows of zeros (paper section 3.3, eq. 2).

    Args:
        a: matrix `[b, c]`.
        b: matrix `[c, d]`, dtype and device of `a`.
        tol: magnitude at or below which an entry of `a` counts as zero.

    Returns:
        `indices [2, R * d]` int64 in row-major order and `values [R * d]`, where `R` is the number
        of rows of `a` with an entry of `abs > tol`.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device, or a bad `tol`.
    """
    check_product(a, b, tol)
    return _op(a, b, tol)
