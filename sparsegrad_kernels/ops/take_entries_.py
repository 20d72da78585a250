"""Take the entries that are not zero out of a matrix: what an optimizer wrote, for the fold.

Private: `_gradient.py` uses it where the host may know how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define


def _reference(delta: Tensor) -> tuple[Tensor, Tensor]:
    indices = delta.nonzero().T.contiguous()
    entries = (indices[0], indices[1])
    values = delta[entries]
    delta[entries] = 0
    return indices, values


def _fake(delta: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return delta.new_empty((2, n), dtype=torch.int64), delta.new_empty(n)


take_entries_ = define(
    "_take_entries_(Tensor(a!) delta) -> (Tensor, Tensor)",
    _reference,
    _fake,
)
"""`indices [2, n]` (int64, row-major order) and `values [n]` of what is not zero in `delta`, which
is then zero. NaN is not zero.
"""
