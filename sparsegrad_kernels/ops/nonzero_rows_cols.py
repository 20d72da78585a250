"""Which rows and columns of a matrix hold anything: eq. 1's `rows` and `cols`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_matrix, check_tol
from ._library import define


def nonzero_mask(a: Tensor, tol: float) -> Tensor:
    """Entries with magnitude above `tol`; NaN is not below anything, so it counts."""
    return a != 0 if tol == 0 else ~(a.abs() <= tol)


def _reference(a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    mask = nonzero_mask(a, tol)  # [b, c]
    return mask.any(1).nonzero().squeeze(1), mask.any(0).nonzero().squeeze(1)


def _fake(a: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows = a.new_empty(context.new_dynamic_size(), dtype=torch.int64)
    return rows, a.new_empty(context.new_dynamic_size(), dtype=torch.int64)


_op = define("nonzero_rows_cols(Tensor a, float tol) -> (Tensor, Tensor)", _reference, _fake)


def nonzero_rows_cols(a: Tensor, tol: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows and columns of `a` that hold an entry with `abs > tol` (paper section 3.3, eq. 1).

    Args:
        a: matrix `[b, c]`; NaN counts as nonzero.
        tol: magnitude at or below which an entry counts as zero.

    Returns:
        `rows [R]` and `cols [C]`, int64, ascending.

    Raises:
        TypeError, ValueError: `a` is no floating matrix, or `tol` is NaN, infinite or negative.
    """
    check_matrix("a", a)
    check_tol(tol)
    return _op(a, tol)
