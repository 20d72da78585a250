"""`fold_`: `W += V^T D~ U`, D~ given by its entries, in one launch, in an order that does not vary.

Its tasks wait for each other as `_dataflow.py` says. A stable counting sort brings the entries of
one row or column of D~ together, in the order given. Then tiles of the factor, `V^T D~` or `D~ U`,
whichever is cheaper, are summed from rows of one basis, and tiles of W from the factor and the
other, each as soon as its own columns of the factor are there. Each sum has one program, and no
two programs write to one place. With one basis see `_add_rows.py`, without any `_add_entries.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._checks import check_bounds
from ._add_entries import ADD_ENTRIES_AOT, add_entries
from ._add_rows import ADD_ROWS_AOT, TASK_COLS, TASK_ROWS, add_rows, entry_range, sum_of_rows
from ._common import implement, needs_int64
from ._counting_sort import PLACED, sort_of, sort_task
from ._dataflow import signal, take_ticket, wait, zeroed
from ._product import (
    ALL,
    CONFIGS,
    LISTED,
    TunedProduct,
    bucket,
    precision,
    product_tile,
    tile_of,
)
from ._rounding import rounded


@triton.jit
def _factor_tile(
    basis, basis_row_stride, basis_col_stride, n_cols, first_row, n_rows, first_col,
    starts, inner, values, n, factor,
):  # fmt: skip
    """`factor[o] = sum of values[e] * basis[inner[e]]` over `starts[o] <= e < starts[o + 1]`."""
    cols = first_col + tl.arange(0, TASK_COLS)
    to = factor + first_row.to(tl.int64) * n_cols + cols
    for row in range(first_row, tl.minimum(first_row + TASK_ROWS, n_rows)):
        begin, end = entry_range(starts, row, n_rows, n)
        sums = sum_of_rows(
            basis, basis_row_stride, basis_col_stride, cols, n_cols, inner, values, begin, end
        )
        tl.store(to, sums, mask=cols < n_cols)
        to += n_cols


@triton.jit(do_not_specialize=["n", "n_parts", "n_sort", "bucket"])
def _fold_kernel(
    weight, row_stride, col_stride,
    first, first_row_stride, first_col_stride,
    second, second_row_stride, second_col_stride,
    outer, inner, entry_stride, values, value_stride,
    n, n_outer, n_parts, n_sort, n_rows, n_cols, seed, bucket,
    tickets, flags, totals, counts, ready,
    starts, present, sorted_inner, sorted_values, factor,
    LEFT: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`W += F^T U` for `F = D~^T V` if LEFT, else `W += V^T F` for `F = D~ U`.

    `first` is the basis in F, `second` the other. `outer` and `inner` are an entry's row and
    column of what F multiplies `first` by: D~^T if LEFT, else D~. `factor` is F, contiguous.
    """
    tl.static_assert(TASK_COLS % (BLOCK_M if LEFT else BLOCK_N) == 0)
    task = take_ticket(tickets)
    width = n_rows if LEFT else n_cols
    row_tasks = tl.cdiv(n_outer, TASK_ROWS)
    n_factor = row_tasks * tl.cdiv(width, TASK_COLS)
    if task < n_sort:
        sort_task(
            task, outer, entry_stride, inner, entry_stride, values, value_stride,
            n, n_outer, n_parts, flags, totals, counts,
            None, sorted_inner, sorted_values, starts, present,
        )  # fmt: skip
    elif task < n_sort + n_factor:
        # Columns of F one after another, since all tasks of one read the same part of `first`.
        tile = task - n_sort
        col_task = tile // row_tasks
        wait(flags + PLACED, n_parts)
        _factor_tile(
            first, first_row_stride, first_col_stride, width,
            (tile - col_task * row_tasks) * TASK_ROWS, n_outer, col_task * TASK_COLS,
            starts, sorted_inner, sorted_values, n, factor,
        )  # fmt: skip
        signal(ready + col_task)
    else:
        # In the order in which F's columns become ready.
        tile = task - n_sort - n_factor
        row_tiles = tl.cdiv(n_rows, BLOCK_M)
        col_tiles = tl.cdiv(n_cols, BLOCK_N)
        if LEFT:
            row_tile, col_tile = tile_of(tile, row_tiles, col_tiles, GROUP)
            wait(ready + row_tile * BLOCK_M // TASK_COLS, row_tasks)
            sums = product_tile(
                factor, 1, width, second, second_row_stride, second_col_stride,
                present, n_rows, n_rows, present, n_outer, n_outer, n_cols,
                row_tile, col_tile, 0, 1,
                ROWS, INNER, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            col_tile, row_tile = tile_of(tile, col_tiles, row_tiles, GROUP)
            wait(ready + col_tile * BLOCK_N // TASK_COLS, row_tasks)
            sums = product_tile(
                second, second_col_stride, second_row_stride, factor, width, 1,
                present, n_rows, n_rows, present, n_outer, n_outer, n_cols,
                row_tile, col_tile, 0, 1,
                ROWS, INNER, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip

        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        if WIDE:
            rows = rows.to(tl.int64)
            cols = cols.to(tl.int64)
        position = (rows[:, None] * n_cols + cols[None, :]).to(tl.int64)
        place = weight + rows[:, None] * row_stride + cols[None, :] * col_stride
        old = tl.load(place, mask=mask, other=0.0)
        total = old.to(sums.dtype) + sums
        tl.store(place, rounded(total, old, seed, position, STOCHASTIC), mask=mask)


# Tuning runs the kernel many times: each time on the same weight, and on zeros.
_tuned = TunedProduct(
    _fold_kernel, restore=("weight", "tickets", "flags", "totals", "counts", "ready")
)


def _fold(
    weight: Tensor, u: Tensor, v: Tensor, indices: Tensor, values: Tensor, seed: Tensor | None
) -> None:
    (n_rows, n_cols), n = weight.shape, values.shape[0]
    left_first = n * n_rows + u.shape[0] * n_cols * n_rows
    right_first = n * n_cols + v.shape[0] * n_cols * n_rows
    left = left_first <= right_first
    first, second = (v, u) if left else (u, v)
    inner, outer = (indices[0], indices[1]) if left else (indices[1], indices[0])

    n_outer, width = second.shape[0], first.shape[1]
    sort = sort_of(n, n_outer)
    col_tasks = triton.cdiv(width, TASK_COLS.value)
    before = sort.n_tasks + triton.cdiv(n_outer, TASK_ROWS.value) * col_tasks
    tickets, flags, totals, counts, ready = zeroed(weight.device, 1, *sort.sizes, col_tasks)
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = weight.new_empty((n_outer, width), dtype=wide)
    # A narrow basis is exact in tf32, and the factor, rounded to tf32, still finer than it.
    narrow = weight.element_size() == 2

    def grid(tile: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(n_rows, tile["BLOCK_M"]) * triton.cdiv(n_cols, tile["BLOCK_N"])
        return (before + tiles,)

    _tuned(
        max(weight.element_size(), 4), grid,
        weight=weight, row_stride=weight.stride(0), col_stride=weight.stride(1),
        first=first, first_row_stride=first.stride(0), first_col_stride=first.stride(1),
        second=second, second_row_stride=second.stride(0), second_col_stride=second.stride(1),
        outer=outer, inner=inner, entry_stride=outer.stride(0),
        values=values, value_stride=values.stride(0),
        n=n, n_outer=n_outer, n_parts=sort.n_parts, n_sort=sort.n_tasks,
        n_rows=n_rows, n_cols=n_cols, seed=seed, bucket=bucket(n_rows, n_outer, n_cols, 1 + left),
        tickets=tickets, flags=flags, totals=totals, counts=counts, ready=ready,
        starts=totals.new_empty(n_outer), present=totals.new_empty(n_outer, dtype=torch.int32),
        sorted_inner=totals.new_empty(n, dtype=torch.int32), sorted_values=values.new_empty(n),
        factor=factor, LEFT=left, STOCHASTIC=seed is not None,
        ROWS=ALL.value, INNER=LISTED.value,
        PRECISION="tf32" if narrow else precision(), WIDE=needs_int64(weight, factor, second),
    )  # fmt: skip


@implement("_fold_stochastic_")
def fold_stochastic_(
    weight: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    indices: Tensor,
    values: Tensor,
    seed: Tensor | None,
) -> None:
    n_rows = weight.shape[0] if v is None else v.shape[0]
    n_cols = weight.shape[1] if u is None else u.shape[0]
    check_bounds(indices, (n_rows, n_cols))
    if values.shape[0] == 0 or weight.numel() == 0:
        return
    weight = weight.detach()  # tuning writes it back
    if u is not None and v is not None:
        _fold(weight, u, v, indices, values, seed)
    elif u is not None:
        add_rows(weight, u, False, indices, values, seed)
    elif v is not None:
        add_rows(weight, v, True, indices, values, seed)
    else:
        add_entries(weight, indices, values, seed)


@implement("fold_")
def fold_(
    weight: Tensor, u: Tensor | None, v: Tensor | None, indices: Tensor, values: Tensor
) -> None:
    fold_stochastic_(weight, u, v, indices, values, None)


def _variant(name: str, left: bool) -> tuple[dict[str, str], dict[str, Any]]:
    narrow, wide = name in ("bf16", "fp16"), "fp64" if name == "fp64" else "fp32"
    pointers = dict.fromkeys(("weight", "first", "second", "values", "sorted_values"), f"*{name}")
    longs = ("outer", "inner", "tickets", "flags", "totals", "counts", "ready", "starts")
    pointers |= dict.fromkeys(longs, "*i64")
    pointers |= dict.fromkeys(("present", "sorted_inner"), "*i32") | {"factor": f"*{wide}"}
    integers = ("row_stride", "first_row_stride", "second_row_stride", "n", "n_outer", "n_parts")
    signature = pointers | dict.fromkeys((*integers, "n_sort", "n_rows", "n_cols", "bucket"), "i32")
    ones = ("col_stride", "first_col_stride", "second_col_stride", "entry_stride", "value_stride")
    constants: dict[str, Any] = dict.fromkeys(ones, 1) | {"LEFT": left, "STOCHASTIC": narrow}
    constants |= {"ROWS": ALL.value, "INNER": LISTED.value}
    if narrow:
        return signature | {"seed": "*i64"}, constants
    return signature, constants | {"seed": None}


def _ahead_of_time() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    entries: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for name in ("fp32", "bf16", "fp16", "fp64"):
        configs = CONFIGS[8 if name == "fp64" else 4]
        # 64-bit offsets once, in the tile that is the default.
        for config, wide in [(config, False) for config in configs] + [(configs[0], True)]:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            for left in (True, False):
                signature, constants = _variant(name, left)
                for precise in ("tf32", "ieee") if name == "fp32" else ("tf32",):
                    chosen = constants | {"PRECISION": precise, "WIDE": wide} | config.kwargs
                    entries.append((_fold_kernel, signature, chosen, options))
    return entries


AOT = [*_ahead_of_time(), *ADD_ROWS_AOT, *ADD_ENTRIES_AOT]
