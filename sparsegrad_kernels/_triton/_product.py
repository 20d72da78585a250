"""Tiles of a product whose rows and inner indices are listed: what the kernels multiply with.

    C[m, n] = sum over kk of  A[rows[m], inner[kk]] * B[inner[kk], n]

A and B are read where they lie: nothing is packed. `rows` and `inner` are int32 lists, as
`compact_indices` makes them, and their lengths are read from device memory by the kernel. A list
entry of -1 (padding, or an index left out) takes no part, whatever A and B hold there.

A kernel calls `tile_of` to learn its tile, `product_tile` for the sums, and stores them its way.
`sparse_dense_mm.py` is the example.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ops._library import allows_tf32
from ._common import INTERPRETING

# How an axis of A is addressed.
ALL = tl.constexpr(0)  # every index, in order: the list is not read
LISTED = tl.constexpr(1)  # through the list
EITHER = tl.constexpr(2)  # through the list, unless it holds every index: found out on the device

# A sum is split at multiples of this, which every BLOCK_K divides: the tuning moves no split.
SPLIT_UNIT = tl.constexpr(128)

# Triton's interpreter (3.9) multiplies bfloat16 by its bits, as integers.
_CONVERT = tl.constexpr(INTERPRETING)


@triton.jit
def tile_of(program, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """The tile `(row, column)` of a program, `program < n_row_tiles * n_col_tiles`.

    Column by column within bands of GROUP rows of tiles, so that programs which run together
    share rows of A and columns of B in the cache.
    """
    band = GROUP * n_col_tiles
    first = program // band * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    inside = program % band
    return first + inside % height, inside // height


@triton.jit
def listed(indices, count, positions):
    """`indices[positions]`, -1 beyond `count`."""
    return tl.load(indices + positions, mask=positions < count, other=-1)


@triton.jit
def _sums(
    a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
    rows, n_rows, row_positions, inner, begin, end, n_cols, cols,
    GATHER_ROWS: tl.constexpr, GATHER_INNER: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`product_tile`, with how its axes are addressed decided."""
    wide = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    row_mask = row_positions < n_rows  # [BLOCK_M]
    if GATHER_ROWS:
        row = tl.load(rows + row_positions, mask=row_mask, other=-1)
        row_mask = row >= 0
    else:
        row = row_positions
    col_mask = cols < n_cols  # [BLOCK_N]
    if WIDE:
        row = row.to(tl.int64)
        cols = cols.to(tl.int64)
    a_rows = a + row[:, None] * a_row_stride  # [BLOCK_M, 1]
    b_cols = b + cols[None, :] * b_col_stride  # [1, BLOCK_N]

    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    for start in range(begin, end, BLOCK_K):
        kk = start + tl.arange(0, BLOCK_K)
        mask = kk < end
        if GATHER_INNER:
            kk = tl.load(inner + kk, mask=mask, other=-1)
            mask = kk >= 0
        if WIDE:
            kk = kk.to(tl.int64)
        a_tile = tl.load(
            a_rows + kk[None, :] * a_inner_stride,
            mask=row_mask[:, None] & mask[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        b_tile = tl.load(
            b_cols + kk[:, None] * b_inner_stride,
            mask=mask[:, None] & col_mask[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        if _CONVERT or a.dtype.element_ty != b.dtype.element_ty:
            a_tile = a_tile.to(wide)
            b_tile = b_tile.to(wide)
        sums = tl.dot(a_tile, b_tile, sums, input_precision=PRECISION, out_dtype=wide)
    return sums


@triton.jit
def product_tile(
    a, a_row_stride, a_inner_stride,
    b, b_inner_stride, b_col_stride,
    rows, n_rows, all_rows,
    inner, n_inner, all_inner,
    n_cols,
    row_tile, col_tile, part, n_parts,
    ROWS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of C: `[BLOCK_M, BLOCK_N]` in float32, float64 for a float64 A.

    Args:
        a, b: pointers to A `[all_rows, all_inner]` and B `[all_inner, n_cols]`, any strides; where
            their dtypes differ both are converted to the result's.
        rows, n_rows: the int32 list and its length, a value the kernel has read; C has `n_rows`
            rows. Unread where ROWS is ALL: pass any pointer, and `all_rows`.
        inner, n_inner: the same for the inner index.
        row_tile, col_tile: which tile of C; entries of it that C does not have are 0.
        part, n_parts: sum only this one of `n_parts` shares of `inner` (0, 1: all of it).
        ROWS, INNER: ALL, LISTED or EITHER, of which one at most EITHER; see `addressing`.
        PRECISION: of products of float32: "tf32" or "ieee"; see `precision`.
        WIDE: whether offsets into A or B need 64 bits.
    """
    row_positions = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(n_inner, n_parts), SPLIT_UNIT) * SPLIT_UNIT
    begin = part * share
    end = tl.minimum(begin + share, n_inner)
    # Where an axis is not gathered its bound is the shape, not the count that equals it: of an
    # argument the compiler knows whether 16 divides it, and then loads 16 bytes at a time.
    all_end = tl.minimum(begin + share, all_inner)
    if ROWS == EITHER:
        if n_rows == all_rows:
            sums = _sums(
                a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
                rows, all_rows, row_positions, inner, begin, end, n_cols, cols,
                False, INNER != ALL, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sums = _sums(
                a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
                rows, n_rows, row_positions, inner, begin, end, n_cols, cols,
                True, INNER != ALL, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    elif INNER == EITHER:
        if n_inner == all_inner:
            sums = _sums(
                a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
                rows, n_rows, row_positions, inner, begin, all_end, n_cols, cols,
                ROWS != ALL, False, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sums = _sums(
                a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
                rows, n_rows, row_positions, inner, begin, end, n_cols, cols,
                ROWS != ALL, True, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        sums = _sums(
            a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
            rows, n_rows, row_positions, inner, begin, end, n_cols, cols,
            ROWS != ALL, INNER != ALL, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return sums


def addressing(a: Tensor) -> dict[str, int]:
    """ROWS and INNER for A with lists of both: the axis that lies contiguous may be complete.

    Along that axis a list costs wide loads; along the other it costs nothing, and is always used.
    """
    if a.stride(0) == 1:
        return {"ROWS": EITHER.value, "INNER": LISTED.value}
    if a.stride(1) == 1:
        return {"ROWS": LISTED.value, "INNER": EITHER.value}
    return {"ROWS": LISTED.value, "INNER": LISTED.value}


def precision() -> str:
    """How the user lets torch multiply float32 matrices."""
    return "tf32" if allows_tf32() else "ieee"


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


# By the size of an element. Each fits the shared memory of sm_80 (163 KB) and gfx942 (64 KB), and
# no accumulator spills. The first of each list is the default where nothing is tuned.
CONFIGS: dict[int, list[triton.Config]] = {
    2: [
        _tile(64, 64, 64, 4, 3),
        _tile(128, 128, 64, 8, 3),  # large products
        _tile(128, 64, 64, 4, 3),
        _tile(64, 128, 64, 4, 3),
        _tile(32, 64, 64, 4, 3),  # few rows kept
    ],
    4: [
        _tile(64, 64, 16, 8, 3),
        _tile(128, 64, 32, 8, 3),  # large products
        _tile(32, 32, 32, 4, 3),  # few rows kept
    ],
    8: [
        _tile(32, 32, 16, 4, 2),
        _tile(64, 32, 16, 4, 3),
        _tile(64, 64, 16, 8, 3),
    ],
}


class TunedProduct:
    """A kernel around `product_tile`, with its tile chosen per dtype and bucket of sizes.

    Args:
        kernel: takes BLOCK_M, BLOCK_N, BLOCK_K, GROUP, and an unread integer `bucket`.
        restore: arguments the kernel adds to, put back while tuning.
    """

    def __init__(self, kernel: Any, restore: tuple[str, ...] = ()) -> None:
        self.kernel = kernel
        self._tuned = {
            size: triton.autotune(
                configs,
                key=["bucket", "ROWS", "INNER", "PRECISION"],
                restore_value=list(restore) or None,
            )(kernel)
            for size, configs in CONFIGS.items()
            if not INTERPRETING
        }

    def __call__(self, element_size: int, grid: Any, **arguments: Any) -> None:
        """Launch on `grid`, a function of the chosen sizes, as in Triton."""
        if INTERPRETING:
            self.kernel[grid](**arguments, **CONFIGS[element_size][0].kwargs)
        else:
            self._tuned[element_size][grid](**arguments)


def bucket(*sizes: int) -> int:
    """Sizes up to powers of two, in one number: products in one bucket share a tuning."""
    number = 0
    for size in sizes:
        number = number * 64 + max(size - 1, 0).bit_length()
    return number
