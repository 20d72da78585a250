"""`W += D~`, D~ given by its entries, in one launch: `fold_` without a basis.

The entries of one element are added in the order given and their sum is rounded once. Two stable
counting sorts, by column and then by row, bring them together: tasks of `_dataflow.py`.
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

_BLOCK = tl.constexpr(256)


@triton.jit
def _add_entries(
    block, weight, row_stride, col_stride, n_cols, rows, cols, values, n, seed,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """`W[row, col] += values of that element`, one after another; elements are together."""
    e = block.to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    mask = e < n
    row = tl.load(rows + e, mask=mask, other=-1).to(tl.int64)
    col = tl.load(cols + e, mask=mask, other=-1).to(tl.int64)
    has_previous = mask & (e > 0)
    previous_row = tl.load(rows + e - 1, mask=has_previous, other=-1)
    previous_col = tl.load(cols + e - 1, mask=has_previous, other=-1)
    first = mask & ((row != previous_row) | (col != previous_col))

    place = weight + row * row_stride + col * col_stride
    old = tl.load(place, mask=first, other=0.0)
    wide = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    total = old.to(wide)
    more = first
    while tl.max(more.to(tl.int32), 0) > 0:
        value = tl.load(values + e, mask=more, other=0.0)
        total = tl.where(more, total + value.to(wide), total)
        e += 1
        more = more & (e < n)
        more = more & (tl.load(rows + e, mask=more, other=-1) == row)
        more = more & (tl.load(cols + e, mask=more, other=-1) == col)
    new = rounded(total, old, seed, row * n_cols + col, STOCHASTIC)
    tl.store(place, new, mask=first)


@triton.jit(do_not_specialize=["n", "n_parts", "n_col_sort", "n_row_sort"])
def _add_entries_kernel(
    weight, row_stride, col_stride, n_rows, n_cols, rows, cols, entry_stride,
    values, value_stride, n, n_parts, n_col_sort, n_row_sort, seed,
    tickets, col_flags, col_totals, col_counts, row_flags, row_totals, row_counts,
    rows_1, cols_1, values_1, rows_2, cols_2, values_2,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """`W += D~`: entries sorted by column, then by row, and each element's sum rounded once."""
    task = take_ticket(tickets)
    if task < n_col_sort:
        sort_task(
            task, cols, entry_stride, rows, entry_stride, values, value_stride,
            n, n_cols, n_parts, col_flags, col_totals, col_counts,
            cols_1, rows_1, values_1, None, None,
        )  # fmt: skip
    elif task < n_col_sort + n_row_sort:
        wait(col_flags + PLACED, n_parts)
        sort_task(
            task - n_col_sort, rows_1, 1, cols_1, 1, values_1, 1,
            n, n_rows, n_parts, row_flags, row_totals, row_counts,
            rows_2, cols_2, values_2, None, None,
        )  # fmt: skip
    else:
        wait(row_flags + PLACED, n_parts)
        _add_entries(
            task - n_col_sort - n_row_sort, weight, row_stride, col_stride, n_cols,
            rows_2, cols_2, values_2, n, seed, STOCHASTIC,
        )  # fmt: skip


def add_entries(weight: Tensor, indices: Tensor, values: Tensor, seed: Tensor | None) -> None:
    """`weight[indices] += values`; of one element one after another, then rounded once."""
    (n_rows, n_cols), n = weight.shape, values.shape[0]
    by_col, by_row = sort_of(n, n_cols), sort_of(n, n_rows)
    tickets, *zeros = zeroed(weight.device, 1, *by_col.sizes, *by_row.sizes)
    rows_1, cols_1, rows_2, cols_2 = (indices.new_empty(n, dtype=torch.int32) for _ in range(4))
    values_1, values_2 = (values.new_empty(n) for _ in range(2))
    grid = (by_col.n_tasks + by_row.n_tasks + triton.cdiv(n, _BLOCK.value),)
    _add_entries_kernel[grid](
        weight, weight.stride(0), weight.stride(1), n_rows, n_cols,
        indices[0], indices[1], indices.stride(1), values, values.stride(0),
        n, by_col.n_parts, by_col.n_tasks, by_row.n_tasks, seed, tickets, *zeros,
        rows_1, cols_1, values_1, rows_2, cols_2, values_2,
        STOCHASTIC=seed is not None, num_warps=4,
    )  # fmt: skip


def _variant(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    signature = dict.fromkeys(("weight", "values", "values_1", "values_2"), f"*{name}")
    zeros = [f"{axis}_{what}" for axis in ("col", "row") for what in ("flags", "totals", "counts")]
    signature |= dict.fromkeys(("rows", "cols", "tickets", *zeros), "*i64")
    signature |= dict.fromkeys(("rows_1", "cols_1", "rows_2", "cols_2"), "*i32")
    sizes = ("row_stride", "n_rows", "n_cols", "n", "n_parts", "n_col_sort", "n_row_sort")
    signature |= dict.fromkeys(sizes, "i32")
    constants: dict[str, Any] = dict.fromkeys(("col_stride", "entry_stride", "value_stride"), 1)
    if name in ("bf16", "fp16"):
        return signature | {"seed": "*i64"}, constants | {"STOCHASTIC": True}
    return signature, constants | {"STOCHASTIC": False, "seed": None}


ADD_ENTRIES_AOT = [
    (_add_entries_kernel, *_variant(name), {"num_warps": 4})
    for name in ("fp32", "bf16", "fp16", "fp64")
]
