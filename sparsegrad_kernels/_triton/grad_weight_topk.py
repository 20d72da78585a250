"""`grad_weight_topk` near a threshold: a product whose epilogue keeps few of its entries.

Where the threshold let fewer than k entries through, or more than there is room for, the launches
that follow make the whole product and select from it; else they return at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._library import NAMESPACE
from ..ops.topk_coo import carry_
from ._common import implement, needs_int64
from ._product import EITHER, LISTED, addressing, listed, precision, product_tile, tile_of
from ._radix import (
    DONE,
    INEXACT,
    KEY_BITS,
    TOTAL,
    bracket_kth,
    collect_tile,
    forget_candidates,
    is_last,
    magnitude_key,
)
from ._select import NEARED, Candidates, Segments, compiled_ahead, select, selection_ahead
from .sparse_dense_mm import _row_left_out, sparse_dense_mm
from .topk_coo import collect, collection_ahead, room, topk_coo


def _tile(m: int, n: int, k: int, warps: int) -> triton.Config:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    return triton.Config(sizes, num_warps=warps, num_stages=3)


# By the size of an element: small tiles and many warps, since larger ones spill while they collect.
# One for both products, which so round alike. Not tuned: repeated launches would append.
TILES = {2: _tile(64, 64, 64, 8), 4: _tile(64, 64, 32, 8), 8: _tile(32, 32, 16, 4)}
WIDTHS = {2: 64, 4: 64, 8: 32}  # of segments: each divides its tile's


@triton.jit
def near_kernel(
    a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride, rows, inner, kept,
    carried, state, values, columns, offsets, counts, capacity, k,
    all_rows, all_inner, n_cols, per_row,
    KEY_BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Candidates: the entries `abs(C) >= carried` of `C = A[rows][:, inner] @ B[inner]`, rounded.

    INEXACT is set where they do not hold the k largest: `carried` is no threshold, or a bad one.
    """
    PARTS: tl.constexpr = BLOCK_N // WIDTH  # segments of a tile's row
    threshold = tl.load(carried)
    lower = magnitude_key(threshold.to(a.dtype.element_ty))
    if (threshold > 0) & (threshold < float("inf")) & (lower > 0):
        program = tl.program_id(0)
        n_rows = tl.load(kept)
        n_inner = tl.load(kept + 1)
        n_col_tiles = tl.cdiv(n_cols, BLOCK_N)
        n_row_tiles = tl.cdiv(n_rows, BLOCK_M)
        n_tiles = n_row_tiles * n_col_tiles
        # The tile's segments, [BLOCK_M * PARTS]: rows from the first of the tile, part of the row.
        below = tl.arange(0, BLOCK_M * PARTS) // PARTS
        beside = tl.arange(0, BLOCK_M * PARTS) % PARTS
        if program < n_tiles:
            row_tile, col_tile = tile_of(program, n_row_tiles, n_col_tiles, GROUP)
            sums = product_tile(
                a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
                rows, n_rows, all_rows, inner, n_inner, all_inner, n_cols,
                row_tile, col_tile, 0, 1,
                ROWS, INNER, PRECISION, INT64, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            c = tl.reshape(sums.to(a.dtype.element_ty), (BLOCK_M * PARTS, WIDTH))
            row = listed(rows, n_rows, row_tile * BLOCK_M + below)
            if INT64:
                row = row.to(tl.int64)
            part = col_tile * PARTS + beside
            exists = (row >= 0) & (part < per_row)
            col = part[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            collect_tile(
                c, exists[:, None] & (col < n_cols), row * per_row + part, exists, lower,
                state, values, columns, offsets, counts, capacity, KEY_BITS,
            )  # fmt: skip
        else:  # rows left out hold zeros, which are below any threshold
            rest = program - n_tiles
            position = rest // n_col_tiles * BLOCK_M + below
            row = _row_left_out(rows, n_rows, position)
            if INT64:
                row = row.to(tl.int64)
            part = rest % n_col_tiles * PARTS + beside
            exists = (position < all_rows - n_rows) & (part < per_row)
            tl.store(counts + row * per_row + part, tl.zeros_like(beside), mask=exists)
    if is_last(state + DONE + NEARED, tl.num_programs(0)):
        total = tl.load(state + TOTAL, cache_modifier=".cg")
        if (total >= k) & (total <= capacity):
            bracket_kth(state, k, lower, KEY_BITS)
        else:
            forget_candidates(state)


@triton.jit
def whole_kernel(
    a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride, rows, inner, kept,
    dense, state, all_rows, all_inner, n_cols,
    ROWS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """If INEXACT: `dense[rows] = A[rows][:, inner] @ B[inner]`, zeros in the other rows."""
    if tl.load(state + INEXACT) != 0:
        program = tl.program_id(0)
        n_rows = tl.load(kept)
        n_inner = tl.load(kept + 1)
        n_col_tiles = tl.cdiv(n_cols, BLOCK_N)
        n_row_tiles = tl.cdiv(n_rows, BLOCK_M)
        n_tiles = n_row_tiles * n_col_tiles
        if program < n_tiles:
            row_tile, col_tile = tile_of(program, n_row_tiles, n_col_tiles, GROUP)
            sums = product_tile(
                a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
                rows, n_rows, all_rows, inner, n_inner, all_inner, n_cols,
                row_tile, col_tile, 0, 1,
                ROWS, INNER, PRECISION, INT64, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            c = sums.to(dense.dtype.element_ty)
            row = listed(rows, n_rows, row_tile * BLOCK_M + tl.arange(0, BLOCK_M))
            exists = row >= 0
        else:
            c = tl.zeros((BLOCK_M, BLOCK_N), dense.dtype.element_ty)
            position = (program - n_tiles) // n_col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            row = _row_left_out(rows, n_rows, position).to(tl.int32)
            exists = position < all_rows - n_rows
            col_tile = (program - n_tiles) % n_col_tiles
        col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if INT64:
            row, col = row.to(tl.int64), col.to(tl.int64)
        at = row[:, None] * n_cols + col[None, :]
        tl.store(dense + at, c, mask=exists[:, None] & (col < n_cols)[None, :])


def _dense_buffer(g: Tensor, x: Tensor) -> Tensor:
    """For the whole product: written only where the threshold does not serve."""
    return g.new_empty(g.shape[1], x.shape[1])


@implement("grad_weight_topk")
def grad_weight_topk(g: Tensor, x: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    """Without a threshold there is nothing to fuse by: the product, then the selection from it."""
    return topk_coo(sparse_dense_mm(g.T, x, tol), k)


@implement("_grad_weight_topk_near")
def grad_weight_topk_near(
    g: Tensor, x: Tensor, k: int, tol: float, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    ops = getattr(torch.ops, NAMESPACE)
    n_rows, n_cols = g.shape[1], x.shape[1]
    if k >= n_rows * n_cols:
        indices, values = ops.grad_weight_topk(g, x, k, tol)
        carry_(threshold, values)
        return indices, values
    a, dtype = g.T, g.dtype
    rows, inner, kept = ops.compact_indices(a, tol)
    dense = _dense_buffer(g, x)
    segments = Segments(dense, k, WIDTHS[dtype.itemsize], flat=False)
    candidates = Candidates(segments, room(dense.numel(), k))
    tile = TILES[dtype.itemsize]
    # Rows kept and rows left out may each end in a tile that is not full.
    row_tiles = triton.cdiv(n_rows, tile.kwargs["BLOCK_M"]) + 1
    grid = (row_tiles * triton.cdiv(n_cols, tile.kwargs["BLOCK_N"]),)
    product = (a, *a.stride(), x, *x.stride(), rows, inner, kept)
    options: dict[str, Any] = {
        "PRECISION": precision(),
        "INT64": segments.int64 or needs_int64(a, x),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **addressing(a),
        **tile.kwargs,
    }
    near_kernel[grid](
        *product, threshold, candidates.state, *candidates.buffers, candidates.capacity, k,
        n_rows, a.shape[1], n_cols, segments.per_row,
        KEY_BITS=KEY_BITS[dtype], WIDTH=segments.width, **options,
    )  # fmt: skip
    whole_kernel[grid](*product, dense, candidates.state, n_rows, a.shape[1], n_cols, **options)
    collect(segments, candidates, gated=True)
    return select(segments, candidates, carried=threshold)


def _products_ahead(dtype: torch.dtype, inner_contiguous: bool, int64: bool) -> list[Any]:
    tile, kept = TILES[dtype.itemsize], (LISTED.value, EITHER.value)
    rows, inner = kept if inner_contiguous else reversed(kept)
    constexprs: dict[str, Any] = {
        "a_inner_stride" if inner_contiguous else "a_row_stride": 1,
        "b_col_stride": 1,
        "ROWS": rows,
        "INNER": inner,
        "PRECISION": "tf32" if inner_contiguous else "ieee",
        **tile.kwargs,
    }
    near = {"KEY_BITS": KEY_BITS[dtype], "WIDTH": WIDTHS[dtype.itemsize]}
    items = (
        compiled_ahead(near_kernel, dtype, int64, tile.num_warps, **constexprs, **near),
        compiled_ahead(whole_kernel, dtype, int64, tile.num_warps, **constexprs),
    )
    return [(*item[:3], item[3] | {"num_stages": tile.num_stages}) for item in items]


AOT = [
    item
    for dtype, int64 in [*((dtype, False) for dtype in KEY_BITS), (torch.float32, True)]
    for items in [
        *(_products_ahead(dtype, inner_contiguous, int64) for inner_contiguous in (True, False)),
        collection_ahead(dtype, int64, WIDTHS[dtype.itemsize], True),
        selection_ahead(dtype, int64, WIDTHS[dtype.itemsize], True),
    ]
    for item in items
]
