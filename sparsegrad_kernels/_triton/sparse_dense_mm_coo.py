"""`sparse_dense_mm_coo`: the rows of the compacted product, and where they belong."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._library import NAMESPACE
from ._common import implement
from .sparse_dense_mm import multiply

_BLOCK = 1024


@triton.jit
def _indices_kernel(indices, row_stride, rows, n, n_cols, BLOCK: tl.constexpr):
    """`indices[:, e] = rows[e // n_cols], e % n_cols`."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n
    row = tl.load(rows + entry // n_cols, mask=mask, other=0)
    tl.store(indices + entry, row.to(tl.int64), mask=mask)
    tl.store(indices + row_stride + entry, entry % n_cols, mask=mask)


@implement("sparse_dense_mm_coo")
def sparse_dense_mm_coo(a: Tensor, b: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    n_cols = b.shape[1]
    rows, inner, counts = getattr(torch.ops, NAMESPACE).compact_indices(a, tol)
    product = a.new_empty(a.shape[0], n_cols)
    multiply(a, b, rows, inner, counts, product, scatter=False)
    # The shape of the result depends on the data: the one read of the host.
    n = int(counts[0]) * n_cols
    indices = a.new_empty((2, n), dtype=torch.int64)
    if n:
        grid = (triton.cdiv(n, _BLOCK),)
        _indices_kernel[grid](indices, indices.stride(0), rows, n, n_cols, BLOCK=_BLOCK)
    return indices, product.view(-1)[:n].clone()


AOT: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
    (
        _indices_kernel,
        {"indices": "*i64", "row_stride": size, "rows": "*i32", "n": size, "n_cols": "i32"},
        {"BLOCK": _BLOCK},
        {"num_warps": 4, "num_stages": 1},
    )
    for size in ("i32", "i64")
]
