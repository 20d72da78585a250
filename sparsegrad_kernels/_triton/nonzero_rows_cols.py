"""The kernels of `compact_indices`, then one read of the counts, which the shapes depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import implement
from .compact_indices import padded_indices


@implement("nonzero_rows_cols")
def nonzero_rows_cols(a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    rows, cols, counts = padded_indices(a, tol, torch.int64)
    row_count, col_count = counts.tolist()
    return rows[:row_count], cols[:col_count]


AOT: list[tuple] = []  # its kernels are those of compact_indices
