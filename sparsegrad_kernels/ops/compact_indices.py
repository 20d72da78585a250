"""`nonzero_rows_cols` with shapes that do not depend on the data, hence no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_matrix, check_tol
from ._library import define
from .nonzero_rows_cols import nonzero_mask


def _compact(flags: Tensor) -> Tensor:
    """Positions of the true flags `[n]`, ascending, padded with -1 to `n`."""
    n = flags.shape[0]
    slots = torch.where(flags, flags.cumsum(0) - 1, n)  # the false ones share the last, dropped
    positions = torch.arange(n, dtype=torch.int32, device=flags.device)
    out = torch.full((n + 1,), -1, dtype=torch.int32, device=flags.device)
    return out.scatter_(0, slots, positions)[:n].clone()


def _reference(a: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    mask = nonzero_mask(a, tol)  # [b, c]
    row_flags, col_flags = mask.any(1), mask.any(0)
    counts = torch.stack([row_flags.sum(), col_flags.sum()]).to(torch.int32)
    return _compact(row_flags), _compact(col_flags), counts


def _fake(a: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = a.new_empty(a.shape[0], dtype=torch.int32)
    return rows, a.new_empty(a.shape[1], dtype=torch.int32), a.new_empty(2, dtype=torch.int32)


_op = define("compact_indices(Tensor a, float tol) -> (Tensor, Tensor, Tensor)", _reference, _fake)


def compact_indices(a: Tensor, tol: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`nonzero_rows_cols` without a host sync: padded indices, and the counts on the device.

    Args:
        a: matrix `[b, c]`; NaN counts as nonzero.
        tol: magnitude at or below which an entry counts as zero.

    Returns:
        `rows [b]` and `cols [c]`, int32, ascending, padded with -1; `counts [2]`, int32, on the
        device of `a`: how many of each are real.

    Raises:
        TypeError, ValueError: `a` is no floating matrix, or has 2^31 rows or columns or more;
            `tol` is NaN, infinite or negative.
    """
    check_matrix("a", a)
    check_tol(tol)
    if max(a.shape) >= 2**31:
        raise ValueError(f"a must have fewer than 2^31 rows and columns, got {tuple(a.shape)}")
    return _op(a, tol)
