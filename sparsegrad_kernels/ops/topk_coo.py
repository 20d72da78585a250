"""The k entries of largest magnitude as COO, exact and deterministic.

A magnitude's bits, read as an integer, have the magnitude's order. So the k-th largest is found
by radix selection: per 16 bits one histogram, then only the entries of the k-th one's bucket go on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_k, check_matrix, check_shape, check_tensor
from ._library import define

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
_DIGIT = 16


def magnitude_key(c: Tensor) -> Tensor:
    """Integers in the order of `abs(c)`, every NaN one above infinity."""
    bits = _BITS.get(c.dtype, torch.int16)
    infinity = torch.tensor(torch.inf, dtype=c.dtype).view(bits).item()
    return (c.view(bits) & torch.iinfo(bits).max).clamp_(max=infinity + 1)


def _kth_largest(key: Tensor, k: int) -> tuple[int, int]:
    """The k-th largest of `key [n]`, and how many of its equals are among the k largest."""
    threshold = 0
    for shift in range(torch.iinfo(key.dtype).bits - _DIGIT, -1, -_DIGIT):
        digits = (key >> shift) & (2**_DIGIT - 1) if key.dtype != torch.int16 else key
        counts = torch.bincount(digits, minlength=2**_DIGIT)
        at_or_above = counts.flip(0).cumsum(0).flip(0)
        digit = int(torch.count_nonzero(at_or_above >= k)) - 1
        k -= int(at_or_above[digit] - counts[digit])
        key = key[digits == digit]
        threshold |= digit << shift
    return threshold, k


def _reference(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = c.reshape(-1)
    if k >= flat.shape[0]:
        linear = torch.arange(flat.shape[0], device=c.device)
    else:
        key = magnitude_key(flat)
        threshold, n_equal = _kth_largest(key, k)
        above = (key > threshold).nonzero().squeeze(1)
        equal = (key == threshold).nonzero().squeeze(1)[:n_equal]
        linear = torch.cat([above, equal]).sort().values
    width = max(c.shape[1], 1)
    indices = torch.stack([linear.div(width, rounding_mode="floor"), linear % width])
    return indices, flat[linear]


def _fake(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = torch.sym_min(k, c.numel())
    return c.new_empty((2, n), dtype=torch.int64), c.new_empty(n)


_op = define("topk_coo(Tensor c, int k) -> (Tensor, Tensor)", _reference, _fake)


# The next threshold as a share of the smallest magnitude kept: the gradient may shrink that much
# from one step to the next before too few entries reach it.
SLACK = 0.8


def carry_(threshold: Tensor, values: Tensor) -> None:
    """`threshold [1]` becomes SLACK times the smallest magnitude of `values`, leaving out NaN."""
    if values.shape[0]:
        magnitude = values.abs().float()
        threshold.copy_(SLACK * magnitude.masked_fill(magnitude.isnan(), torch.inf).amin())


def _near_reference(c: Tensor, k: int, threshold: Tensor) -> tuple[Tensor, Tensor]:
    indices, values = _op(c, k)
    carry_(threshold, values)
    return indices, values


def _near_fake(c: Tensor, k: int, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(c, k)


_near_op = define(
    "_topk_coo_near(Tensor c, int k, Tensor(a!) threshold) -> (Tensor, Tensor)",
    _near_reference,
    _near_fake,
)


def select(c: Tensor, k: int, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """`topk_coo` of arguments that are known to be right."""
    return _op(c, k) if threshold is None else _near_op(c, k, threshold)


def check_threshold(threshold: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor("threshold", threshold)
    if threshold.dtype != torch.float32:
        raise TypeError(f"threshold must be float32, got {threshold.dtype}")
    check_shape("threshold", threshold, (1,), "one number")
    if threshold.device != like.device:
        raise ValueError(
            f"threshold must be on the device of {like_name}, {like.device}, got {threshold.device}"
        )


def topk_coo(c: Tensor, k: int, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k entries of `c` of largest magnitude, as COO (the paper's top-k, section 5.1).

    Exact and deterministic: of equal magnitudes the lowest linear index wins; NaN ranks above
    everything, as in `torch.topk`, so that a bad step is seen.

    Args:
        c: matrix `[m, n]`.
        k: how many entries; all of them if `k >= m * n`.
        threshold: `[1]` float32 on the device of `c`, updated in place: keep one per weight from
            step to step, NaN at first. A little below the k-th magnitude (`SLACK` of the last
            step's), it lets a kernel look at what reaches it only. It never decides what the
            result is, only how fast.

    Returns:
        `indices [2, min(k, m * n)]` int64 in row-major order (a COO tensor made of them is
        coalesced as it stands) and their `values`.

    Raises:
        TypeError, ValueError: `c` is no floating matrix, `k < 1`, or a bad `threshold`.
    """
    check_matrix("c", c)
    check_k(k)
    if threshold is not None:
        check_threshold(threshold, "c", c)
    return select(c, k, threshold)
