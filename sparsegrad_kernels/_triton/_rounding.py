"""Storing a float32 or float64 sum in a narrower dtype, to nearest or stochastically.

The same bits as `ops/_rounding.py`, which says what they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl


@triton.jit
def _random_words(key, position):
    """32 random bits for each `position` (int64), by Philox 4x32-10."""
    zeros = tl.zeros_like(position).to(tl.uint32)
    word, _, _, _ = philox_impl(
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        zeros,
        zeros,
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    return word


@triton.jit
def rounded_stochastically(total, old, key, position):
    """`total` (float32) in the dtype of `old`, bfloat16 or float16; `key`: the seed, int64."""
    dropped: tl.constexpr = 16 if old.dtype == tl.bfloat16 else 13
    largest: tl.constexpr = 3.3895313892515355e38 if old.dtype == tl.bfloat16 else 65504.0
    random = _random_words(key, position)
    bits = total.to(tl.int32, bitcast=True)
    low = bits & ((1 << dropped) - 1)
    up = (random >> (32 - dropped)).to(tl.int32) < low
    chosen = bits - low + tl.where(up, 1 << dropped, 0)
    result = chosen.to(tl.float32, bitcast=True)
    if old.dtype == tl.float16:
        # Below 2^-14 float16 is spaced evenly, by 2^-24.
        steps = tl.abs(total) * 16777216.0
        whole = tl.floor(steps)
        uniform = (random >> 8).to(tl.float32) * 5.960464477539063e-08
        size = (whole + tl.where(uniform < steps - whole, 1.0, 0.0)) * 5.960464477539063e-08
        result = tl.where(tl.abs(total) < 6.103515625e-05, tl.where(bits < 0, -size, size), result)
    result = tl.where(tl.abs(total) <= largest, result.to(old.dtype), total.to(old.dtype))
    before = old.to(tl.float32)
    return tl.where((total == before) | (before != before), old, result)


@triton.jit
def rounded(total, old, seed, position, STOCHASTIC: tl.constexpr):
    """`total` in the dtype of `old`, the element it replaces.

    Args:
        seed: pointer to an int64; unread, and may be None, unless STOCHASTIC.
        position: of each element in the matrix, row-major, int64.
    """
    if STOCHASTIC:
        result = rounded_stochastically(total, old, tl.load(seed), position)
    else:
        result = total.to(old.dtype)
    return result
