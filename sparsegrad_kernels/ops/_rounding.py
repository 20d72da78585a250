"""Stochastic rounding of float32 to bfloat16 or float16, the same on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _philox(position: Tensor, seed: Tensor) -> Tensor:
    """32 random bits, as int64, for each `position`: the first word of Philox 4x32-10.

    In int64, where products of two words wrap: their low and high words are right all the same.
    """
    c0, c1 = position & _WORD, (position >> 32) & _WORD
    c2 = c3 = torch.zeros_like(position)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD
        c2, c3 = ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def round_stochastically(
    total: Tensor, old: Tensor, seed: Tensor, position: Tensor | None = None
) -> Tensor:
    """`total` (float32) in the dtype of `old`: up with the share of the gap it is above the lower.

    What is representable, and what equals `old`, stays as it is; NaN, infinities and what lies
    beyond the largest finite number are rounded to nearest. An element's random bits depend on
    `seed [1]` (int64) and on its `position` (int64; by default its row-major index) alone.
    """
    dropped = 16 if old.dtype == torch.bfloat16 else 13
    if position is None:
        position = torch.arange(total.numel(), device=total.device).view(total.shape)
    random = _philox(position, seed)
    bits = total.view(torch.int32)
    low = bits & ((1 << dropped) - 1)
    up = (random >> (32 - dropped)) < low
    result = (bits - low + (up.int() << dropped)).view(torch.float32)
    if old.dtype == torch.float16:
        # Below 2^-14 float16 is spaced evenly, by 2^-24.
        steps = total.abs() * 2.0**24
        whole = steps.floor()
        uniform = (random >> 8).float() * 2.0**-24
        size = (whole + (uniform < steps - whole)) * 2.0**-24
        result = torch.where(total.abs() < 2.0**-14, size.copysign(total), result)
    finite = total.abs() <= torch.finfo(old.dtype).max
    result = torch.where(finite, result.to(old.dtype), total.to(old.dtype))
    return torch.where((total == old) | old.isnan(), old, result)
