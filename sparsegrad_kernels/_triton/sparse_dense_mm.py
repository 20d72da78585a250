"""`sparse_dense_mm`: rows of the compacted product where they belong, zeros in the others."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._library import NAMESPACE
from ._common import implement, needs_int64, num_programs
from ._product import (
    CONFIGS,
    EITHER,
    LISTED,
    TunedProduct,
    addressing,
    bucket,
    listed,
    precision,
    product_tile,
    tile_of,
)


@triton.jit
def _row_left_out(rows, n_rows, position):
    """The `position`-th number that is not among the ascending `rows`: `position + i` for the
    first i with `rows[i] - i > position`, found by bisection."""
    low = tl.zeros_like(position)
    high = low + n_rows
    # rows[i] - i is how many numbers below rows[i] are left out; it never falls.
    span = n_rows
    while span > 0:
        middle = low + (high - low) // 2
        open_ = low < high
        left_out = tl.load(rows + middle, mask=open_, other=0) - middle
        above = left_out > position
        high = tl.where(open_ & above, middle, high)
        low = tl.where(open_ & (above == 0), middle + 1, low)
        span = span // 2
    return position + low


@triton.jit
def _store(out, out_row_stride, out_col_stride, row, mask, cols, n_cols, tile, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
        cols = cols.to(tl.int64)
    to = out + row[:, None] * out_row_stride + cols[None, :] * out_col_stride
    tl.store(to, tile.to(out.dtype.element_ty), mask=mask[:, None] & (cols < n_cols)[None, :])


@triton.jit(do_not_specialize=["bucket"])
def _product_kernel(
    a, a_row_stride, a_inner_stride,
    b, b_inner_stride, b_col_stride,
    out, out_part_stride, out_row_stride, out_col_stride,
    rows, inner, counts,
    all_rows, all_inner, n_cols, n_parts, bucket,
    SCATTER: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`C = A[rows][:, inner] @ B[inner]`; a part of the inner indices per `program_id(1)`.

    With SCATTER, `out[rows] = C`, and the programs that no row is left for write zeros in the
    other rows. Without, `out[part] = C` of the part.
    """
    program = tl.program_id(0)
    part = tl.program_id(1)
    n_rows = tl.load(counts)
    n_inner = tl.load(counts + 1)
    n_col_tiles = tl.cdiv(n_cols, BLOCK_N)
    n_row_tiles = tl.cdiv(n_rows, BLOCK_M)

    if program < n_row_tiles * n_col_tiles:
        row_tile, col_tile = tile_of(program, n_row_tiles, n_col_tiles, GROUP)
        sums = product_tile(
            a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
            rows, n_rows, all_rows, inner, n_inner, all_inner, n_cols,
            row_tile, col_tile, part, n_parts,
            ROWS, INNER, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = row < n_rows
        if SCATTER:
            row = listed(rows, n_rows, row)
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        to = out + part.to(tl.int64) * out_part_stride
        _store(to, out_row_stride, out_col_stride, row, mask, cols, n_cols, sums, WIDE)
    elif SCATTER:
        rest = program - n_row_tiles * n_col_tiles
        position = rest // n_col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = position < all_rows - n_rows
        row = _row_left_out(rows, n_rows, position)
        cols = rest % n_col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        _store(out, out_row_stride, out_col_stride, row, mask, cols, n_cols, zeros, WIDE)


@triton.jit
def _add_parts_kernel(
    parts, part_stride, out, rows, counts, all_rows, n_cols, n_parts,
    SCATTER: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out[rows] = sum of parts`, added in their order; with SCATTER, zeros in the other rows.

    `parts [n_parts, all_rows, n_cols]` and `out [., n_cols]` are contiguous.
    """
    n_rows = tl.load(counts)
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=parts.dtype.element_ty)
    mask = (position < n_rows)[:, None] & (cols < n_cols)[None, :]
    from_ = parts + position.to(tl.int64)[:, None] * n_cols + cols[None, :]
    for _ in range(n_parts):
        sums += tl.load(from_, mask=mask, other=0.0)
        from_ += part_stride
    row = position
    keep = position < n_rows
    if SCATTER:
        left_out = _row_left_out(rows, n_rows, position - n_rows)
        row = tl.where(keep, listed(rows, n_rows, position), left_out)
        keep = position < all_rows
    _store(out, n_cols, 1, row, keep, cols, n_cols, sums, WIDE)


_tuned_product = TunedProduct(_product_kernel)
_ADD_TILE = {"BLOCK_M": 4, "BLOCK_N": 128, "num_warps": 4}


def n_parts_of(rows: int, inner: int, cols: int, device: torch.device) -> int:
    """Into how many parts a sum is split: where the tiles alone would leave the device idle.

    At least 512 inner indices a part, so that adding the parts stays cheap beside them.
    """
    tiles = triton.cdiv(rows, 64) * triton.cdiv(cols, 64)
    return max(1, min(num_programs(device) // max(tiles, 1), inner // 512, 16))


@implement("sparse_dense_mm")
def sparse_dense_mm(a: Tensor, b: Tensor, tol: float) -> Tensor:
    rows, inner, counts = getattr(torch.ops, NAMESPACE).compact_indices(a, tol)
    out = a.new_empty(a.shape[0], b.shape[1])
    multiply(a, b, rows, inner, counts, out)
    return out


def multiply(
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    inner: Tensor,
    counts: Tensor,
    out: Tensor,
    scatter: bool = True,
) -> None:
    """`out[rows] = A[rows][:, inner] @ B[inner]`, and zeros in the other rows of `out`.

    Without `scatter` the product's rows are the first of `out`, which is contiguous, and the
    others are left as they are.
    """
    (n_rows, n_inner), n_cols = a.shape, b.shape[1]
    if out.numel() == 0:
        return
    n_parts = n_parts_of(n_rows, n_inner, n_cols, a.device)
    target, direct = out[None], scatter and n_parts == 1
    if n_parts > 1:
        wide = torch.promote_types(a.dtype, torch.float32)
        target = a.new_empty((n_parts, n_rows, n_cols), dtype=wide)

    def grid(tile: dict[str, Any]) -> tuple[int, int]:
        # Rows kept and rows left out may each end in a tile that is not full.
        row_tiles = triton.cdiv(n_rows, tile["BLOCK_M"]) + direct
        return row_tiles * triton.cdiv(n_cols, tile["BLOCK_N"]), n_parts

    wide_offsets = needs_int64(a, b, target[0])
    _tuned_product(
        a.element_size(), grid,
        a=a, a_row_stride=a.stride(0), a_inner_stride=a.stride(1),
        b=b, b_inner_stride=b.stride(0), b_col_stride=b.stride(1),
        out=target, out_part_stride=target.stride(0), out_row_stride=target.stride(1),
        out_col_stride=target.stride(2), rows=rows, inner=inner, counts=counts,
        all_rows=n_rows, all_inner=n_inner, n_cols=n_cols, n_parts=n_parts,
        bucket=bucket(n_rows, n_inner, n_cols), SCATTER=direct,
        PRECISION=precision(), WIDE=wide_offsets, **addressing(a),
    )  # fmt: skip
    if n_parts > 1:
        add_grid = (
            triton.cdiv(n_rows, _ADD_TILE["BLOCK_M"]),
            triton.cdiv(n_cols, _ADD_TILE["BLOCK_N"]),
        )
        _add_parts_kernel[add_grid](
            target, target.stride(0), out, rows, counts, n_rows, n_cols, n_parts,
            SCATTER=scatter, WIDE=wide_offsets, **_ADD_TILE,
        )  # fmt: skip


_PRODUCT_INTEGERS = (
    "a_row_stride", "a_inner_stride", "b_inner_stride", "b_col_stride", "out_part_stride",
    "out_row_stride", "out_col_stride", "all_rows", "all_inner", "n_cols", "n_parts", "bucket",
)  # fmt: skip


def _product_variant(
    name: str,
    config: triton.Config,
    ones: tuple[str, ...],
    addressed: tuple[int, int],
    **given: Any,
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    pointers = {"a": f"*{name}", "b": f"*{name}", "out": f"*{name}"}
    pointers |= {"rows": "*i32", "inner": "*i32", "counts": "*i32"}
    sizes = dict.fromkeys(_PRODUCT_INTEGERS, "i32")
    contiguous = dict.fromkeys((*ones, "b_col_stride", "out_col_stride"), 1)
    signature = {key: kind for key, kind in (pointers | sizes).items() if key not in contiguous}
    rows, inner = addressed
    constants = {"SCATTER": True, "WIDE": False, "ROWS": rows, "INNER": inner}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _product_kernel, signature, contiguous | constants | given | config.kwargs, options


def _ahead_of_time() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Every tile of every dtype, A contiguous along either axis or none, parts and 64 bits."""
    listed_, either = LISTED.value, EITHER.value
    layouts = (("a_inner_stride",), (listed_, either)), (("a_row_stride",), (either, listed_))
    entries = []
    for name, size in (("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp64", 8)):
        precisions = ("tf32", "ieee") if name == "fp32" else ("ieee",)
        for config, (ones, addressed), by in product(CONFIGS[size], layouts, precisions):
            entries.append(_product_variant(name, config, ones, addressed, PRECISION=by))
        first = CONFIGS[size][0], (), (listed_, listed_)
        entries.append(_product_variant(name, *first, PRECISION="ieee", SCATTER=False))
        entries.append(_product_variant(name, *first, PRECISION="ieee", WIDE=True))
        wide = "fp64" if name == "fp64" else "fp32"
        signature = {"parts": f"*{wide}", "out": f"*{name}", "rows": "*i32", "counts": "*i32"}
        signature |= {"part_stride": "i64", "all_rows": "i32", "n_cols": "i32", "n_parts": "i32"}
        tile = {key: number for key, number in _ADD_TILE.items() if key != "num_warps"}
        options = {"num_warps": _ADD_TILE["num_warps"], "num_stages": 3}
        entries.append(
            (_add_parts_kernel, signature, {"SCATTER": True, "WIDE": True} | tile, options)
        )
    return entries


AOT = _ahead_of_time()
