"""`W += D~ U` or `W += V^T D~`, D~ given by its entries, in one launch: `fold_` with one basis.

A stable counting sort brings the entries of one row of D~ (of one column, for `V^T D~`) together:
tasks of `_dataflow.py`. Each row (column) of W that has any then gets their sum of rows of the
basis, in the order given, and is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._counting_sort import PLACED, sort_of, sort_task
from ._dataflow import take_ticket, wait, zeroed
from ._rounding import rounded

# A task: so many rows of the result, one after another, and so many of their columns.
TASK_ROWS = tl.constexpr(8)
TASK_COLS = tl.constexpr(128)
_ENTRIES = tl.constexpr(32)  # whose rows of the basis are on their way at the same time


@triton.jit
def entry_range(starts, row, n_rows, n):
    """First and last entry of a row, whose first one `starts` has."""
    begin = tl.load(starts + row)
    return begin, tl.load(starts + row + 1, mask=row + 1 < n_rows, other=n)


@triton.jit
def sum_of_rows(basis, basis_row_stride, basis_col_stride, cols, n_cols, inner, values, begin, end):
    """`sum of values[e] * basis[inner[e], cols]` over `begin <= e < end`: `[TASK_COLS]`, wide."""
    wide = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    basis_cols = basis + cols.to(tl.int64)[None, :] * basis_col_stride  # [1, TASK_COLS]
    products = tl.zeros((_ENTRIES, TASK_COLS), dtype=wide)
    for first in range(begin, end, _ENTRIES):
        e = tl.arange(0, _ENTRIES)
        mask = e < tl.minimum(end - first, _ENTRIES).to(tl.int32)
        value = tl.load(values + first + e, mask=mask, other=0.0)
        at = tl.load(inner + first + e, mask=mask, other=0).to(tl.int64)
        tile = tl.load(
            basis_cols + at[:, None] * basis_row_stride,
            mask=mask[:, None] & (cols < n_cols)[None, :],
            other=0.0,
        )  # [_ENTRIES, TASK_COLS]
        products += value.to(wide)[:, None] * tile.to(wide)
    return tl.sum(products, 0)


@triton.jit(do_not_specialize=["n", "n_parts", "n_sort"])
def _add_rows_kernel(
    weight, row_stride, col_stride, n_rows, n_cols,
    basis, basis_row_stride, basis_col_stride,
    outer, inner, entry_stride, values, value_stride, n, n_parts, n_sort, seed,
    tickets, flags, totals, counts, starts, sorted_inner, sorted_values,
    BY_COLS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """`W += D~ basis`, or `W^T += D~^T basis` if BY_COLS; `outer` is the axis of D~ that stays."""
    task = take_ticket(tickets)
    n_outer = n_cols if BY_COLS else n_rows
    width = n_rows if BY_COLS else n_cols
    if task < n_sort:
        sort_task(
            task, outer, entry_stride, inner, entry_stride, values, value_stride,
            n, n_outer, n_parts, flags, totals, counts,
            None, sorted_inner, sorted_values, starts, None,
        )  # fmt: skip
    else:
        row_tasks = tl.cdiv(n_outer, TASK_ROWS)
        tile = task - n_sort
        col_task = tile // row_tasks
        first = (tile - col_task * row_tasks) * TASK_ROWS
        cols = col_task * TASK_COLS + tl.arange(0, TASK_COLS)
        at = cols.to(tl.int64)
        wait(flags + PLACED, n_parts)
        for row in range(first, tl.minimum(first + TASK_ROWS, n_outer)):
            begin, end = entry_range(starts, row, n_outer, n)
            if begin < end:
                sums = sum_of_rows(
                    basis, basis_row_stride, basis_col_stride, cols, width,
                    sorted_inner, sorted_values, begin, end,
                )  # fmt: skip
                to = first.to(tl.int64) + (row - first)
                if BY_COLS:
                    place = weight + at * row_stride + to * col_stride
                    position = at * n_cols + to
                else:
                    place = weight + to * row_stride + at * col_stride
                    position = to * n_cols + at
                old = tl.load(place, mask=cols < width, other=0.0)
                total = old.to(sums.dtype) + sums
                new = rounded(total, old, seed, position, STOCHASTIC)
                tl.store(place, new, mask=cols < width)


def add_rows(
    weight: Tensor,
    basis: Tensor,
    by_cols: bool,
    indices: Tensor,
    values: Tensor,
    seed: Tensor | None,
) -> None:
    """`weight += D basis`, or `weight.T += D.T basis`; each element is rounded once."""
    (n_rows, n_cols), n = weight.shape, values.shape[0]
    n_outer, width = (n_cols, n_rows) if by_cols else (n_rows, n_cols)
    outer, inner = (indices[1], indices[0]) if by_cols else (indices[0], indices[1])
    sort = sort_of(n, n_outer)
    tickets, flags, totals, counts = zeroed(weight.device, 1, *sort.sizes)
    tiles = triton.cdiv(n_outer, TASK_ROWS.value) * triton.cdiv(width, TASK_COLS.value)
    _add_rows_kernel[(sort.n_tasks + tiles,)](
        weight, weight.stride(0), weight.stride(1), n_rows, n_cols,
        basis, basis.stride(0), basis.stride(1),
        outer, inner, outer.stride(0), values, values.stride(0),
        n, sort.n_parts, sort.n_tasks, seed, tickets, flags, totals, counts,
        totals.new_empty(n_outer), indices.new_empty(n, dtype=torch.int32), values.new_empty(n),
        BY_COLS=by_cols, STOCHASTIC=seed is not None, num_warps=4,
    )  # fmt: skip


def _variant(name: str, by_cols: bool) -> tuple[dict[str, str], dict[str, Any]]:
    signature = dict.fromkeys(("weight", "basis", "values", "sorted_values"), f"*{name}")
    longs = ("outer", "inner", "tickets", "flags", "totals", "counts", "starts")
    signature |= dict.fromkeys(longs, "*i64") | {"sorted_inner": "*i32"}
    sizes = ("row_stride", "n_rows", "n_cols", "basis_row_stride", "n", "n_parts", "n_sort")
    signature |= dict.fromkeys(sizes, "i32")
    ones = ("col_stride", "basis_col_stride", "entry_stride", "value_stride")
    constants: dict[str, Any] = dict.fromkeys(ones, 1) | {"BY_COLS": by_cols}
    if name in ("bf16", "fp16"):
        return signature | {"seed": "*i64"}, constants | {"STOCHASTIC": True}
    return signature, constants | {"STOCHASTIC": False, "seed": None}


ADD_ROWS_AOT = [
    (_add_rows_kernel, *_variant(name, by_cols), {"num_warps": 4})
    for name in ("fp32", "bf16", "fp16", "fp64")
    for by_cols in (False, True)
]
