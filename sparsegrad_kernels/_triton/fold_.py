"""`fold_`: `W += V^T D~ U`, D~ given by its entries, in an order that does not vary.

A stable sort brings the entries of one element, or of one row or column of D~, together, in the
order given: each sum then has one program, and no two programs write to one place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._checks import check_bounds
from ._common import implement, needs_int64
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
def _add_entries_kernel(
    weight, row_stride, col_stride, n_cols, keys, order, values, value_stride, n, seed,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`W[key] += values of that key`, one after another, key = row * n_cols + column, sorted."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + e, mask=e < n, other=-1)
    previous = tl.load(keys + e - 1, mask=(e > 0) & (e < n), other=-1)
    first = (e < n) & (key != previous)

    place = weight + (key // n_cols) * row_stride + (key % n_cols) * col_stride
    old = tl.load(place, mask=first, other=0.0)
    wide = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    total = old.to(wide)
    more = first
    while tl.max(more.to(tl.int32), 0) > 0:
        at = tl.load(order + e, mask=more, other=0)
        value = tl.load(values + at * value_stride, mask=more, other=0.0)
        total = tl.where(more, total + value.to(wide), total)
        e += 1
        more = more & (e < n)
        more = more & (tl.load(keys + e, mask=more, other=-1) == key)
    tl.store(place, rounded(total, old, seed, key, STOCHASTIC), mask=first)


@triton.jit
def _sparse_times_kernel(
    basis, basis_row_stride, basis_col_stride, n_cols,
    starts, order, inner, inner_stride, values, value_stride,
    out, present,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out[o] = sum of values[e] * basis[inner[e]]` over the entries e of group o.

    `order[starts[o] : starts[o + 1]]` are the group's entries; `present[o]` is o, or -1 where it
    has none. `out [groups, n_cols]` is contiguous.
    """
    group = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1)

    sums = tl.zeros((BLOCK_N,), dtype=out.dtype.element_ty)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        at = tl.load(order + e, mask=e < end, other=0)
        value = tl.load(values + at * value_stride, mask=e < end, other=0.0)
        row = tl.load(inner + at * inner_stride, mask=e < end, other=0)
        tile = tl.load(
            basis + row[:, None] * basis_row_stride + cols.to(tl.int64)[None, :] * basis_col_stride,
            mask=(e < end)[:, None] & (cols < n_cols)[None, :],
            other=0.0,
        )  # [BLOCK_E, BLOCK_N]
        sums += tl.sum(value.to(sums.dtype)[:, None] * tile.to(sums.dtype), 0)

    tl.store(out + group.to(tl.int64) * n_cols + cols, sums, mask=cols < n_cols)
    if tl.program_id(1) == 0:
        tl.store(present + group, tl.where(begin < end, group, -1))


@triton.jit(do_not_specialize=["bucket"])
def _add_product_kernel(
    weight, row_stride, col_stride,
    a, a_row_stride, a_inner_stride,
    b, b_inner_stride, b_col_stride,
    inner, n_inner, n_rows, n_cols, seed, bucket,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`W += A[:, inner] @ B[inner]`, where `inner` is not -1."""
    row_tile, col_tile = tile_of(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N), GROUP
    )
    sums = product_tile(
        a, a_row_stride, a_inner_stride, b, b_inner_stride, b_col_stride,
        inner, n_rows, n_rows, inner, n_inner, n_inner, n_cols,
        row_tile, col_tile, 0, 1,
        ROWS, INNER, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    position = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    place = weight + rows[:, None] * row_stride + cols[None, :] * col_stride
    old = tl.load(place, mask=mask, other=0.0)
    total = old.to(sums.dtype) + sums
    tl.store(place, rounded(total, old, seed, position, STOCHASTIC), mask=mask)


_tuned_product = TunedProduct(_add_product_kernel, restore=("weight",))
_ENTRIES_BLOCK = 256
_GROUP_TILE = {"BLOCK_E": 8, "BLOCK_N": 256, "num_warps": 4}


def _sparse_times(
    basis: Tensor, indices: Tensor, values: Tensor, axis: int, n_groups: int
) -> tuple[Tensor, Tensor]:
    """`D~ @ basis` for axis 0, `D~.T @ basis` for 1, in float32 or wider, and its rows' list."""
    keys, order = indices[axis].sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(n_groups + 1, device=keys.device))
    n_cols = basis.shape[1]
    wide = torch.promote_types(basis.dtype, torch.float32)
    out = basis.new_empty((n_groups, n_cols), dtype=wide)
    present = basis.new_empty(n_groups, dtype=torch.int32)
    inner = indices[1 - axis]
    grid = (n_groups, triton.cdiv(n_cols, _GROUP_TILE["BLOCK_N"]))
    _sparse_times_kernel[grid](
        basis, basis.stride(0), basis.stride(1), n_cols, starts, order,
        inner, inner.stride(0), values, values.stride(0), out, present, **_GROUP_TILE,
    )  # fmt: skip
    return out, present


def _add_product(
    weight: Tensor, left: Tensor, right: Tensor, present: Tensor, seed: Tensor | None
) -> None:
    """`weight += left.T @ right`, over the rows of both that `present` lists."""
    n_rows, n_cols = weight.shape
    # A narrow factor is exact in tf32, and the other, rounded to tf32, still finer than it.
    narrow = weight.element_size() == 2

    def grid(tile: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(n_rows, tile["BLOCK_M"]) * triton.cdiv(n_cols, tile["BLOCK_N"]),)

    _tuned_product(
        max(weight.element_size(), 4), grid,
        weight=weight, row_stride=weight.stride(0), col_stride=weight.stride(1),
        a=left, a_row_stride=left.stride(1), a_inner_stride=left.stride(0),
        b=right, b_inner_stride=right.stride(0), b_col_stride=right.stride(1),
        inner=present, n_inner=present.shape[0], n_rows=n_rows, n_cols=n_cols, seed=seed,
        bucket=bucket(n_rows, present.shape[0], n_cols), STOCHASTIC=seed is not None,
        ROWS=ALL.value, INNER=LISTED.value, PRECISION="tf32" if narrow else precision(),
        WIDE=needs_int64(weight, left, right),
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
    n, (n_out, n_in) = values.shape[0], weight.shape
    r_out, r_in = (n_out if v is None else v.shape[0]), (n_in if u is None else u.shape[0])
    check_bounds(indices, (r_out, r_in))
    if n == 0 or weight.numel() == 0:
        return
    weight = weight.detach()  # tuning writes it back
    if u is None or v is None:
        keys, order = (indices[0] * n_in + indices[1]).sort(stable=True)
        _add_entries_kernel[(triton.cdiv(n, _ENTRIES_BLOCK),)](
            weight, weight.stride(0), weight.stride(1), n_in, keys, order,
            values, values.stride(0), n, seed, STOCHASTIC=seed is not None, BLOCK=_ENTRIES_BLOCK,
        )  # fmt: skip
        return
    left_first = n * n_out + r_in * n_in * n_out
    right_first = n * n_in + r_out * n_in * n_out
    if left_first <= right_first:
        left, present = _sparse_times(v, indices, values, 1, r_in)
        _add_product(weight, left, u, present, seed)
    else:
        right, present = _sparse_times(u, indices, values, 0, r_out)
        _add_product(weight, v, right, present, seed)


@implement("fold_")
def fold_(
    weight: Tensor, u: Tensor | None, v: Tensor | None, indices: Tensor, values: Tensor
) -> None:
    fold_stochastic_(weight, u, v, indices, values, None)


def _aligned_product(name: str, narrow: bool) -> tuple[dict[str, str], dict[str, Any]]:
    signature = {"weight": f"*{name}", "inner": "*i32", "seed": "*i64"}
    # The factor the entries were multiplied into is wide; each may be either.
    signature |= {"a": "*fp32" if narrow else f"*{name}", "b": f"*{name}"}
    integers = ("row_stride", "a_inner_stride", "b_inner_stride", "n_inner", "n_rows", "n_cols")
    signature |= dict.fromkeys((*integers, "bucket"), "i32")
    constants: dict[str, Any] = {
        "col_stride": 1,
        "a_row_stride": 1,
        "b_col_stride": 1,
        "STOCHASTIC": narrow,
    }
    constants |= {"ROWS": ALL.value, "INNER": LISTED.value}
    if not narrow:
        del signature["seed"]
        constants["seed"] = None
    return signature, constants


def _ahead_of_time() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    entries: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for name in ("fp32", "bf16", "fp16", "fp64"):
        narrow, wide = name in ("bf16", "fp16"), "fp64" if name == "fp64" else "fp32"
        options = {"num_warps": 4, "num_stages": 3}
        seed = {"seed": "*i64"} if narrow else {}
        no_seed = {} if narrow else {"seed": None}
        strides = dict.fromkeys(("row_stride", "n_cols", "n"), "i32")
        signature = {"weight": f"*{name}", "keys": "*i64", "order": "*i64", "values": f"*{name}"}
        constants = {"col_stride": 1, "value_stride": 1, "STOCHASTIC": narrow} | no_seed
        constants |= {"BLOCK": _ENTRIES_BLOCK}
        entries.append((_add_entries_kernel, signature | strides | seed, constants, options))

        pointers = {"basis": f"*{name}", "values": f"*{name}", "out": f"*{wide}"}
        pointers |= {"starts": "*i64", "order": "*i64", "inner": "*i64", "present": "*i32"}
        for width in ("i32", "i64"):
            sizes = {"basis_row_stride": width, "n_cols": "i32"}
            ones = dict.fromkeys(("basis_col_stride", "inner_stride", "value_stride"), 1)
            tile = {key: size for key, size in _GROUP_TILE.items() if key != "num_warps"}
            entries.append((_sparse_times_kernel, pointers | sizes, ones | tile, options))

        signature, constants = _aligned_product(name, narrow)
        for config in CONFIGS[8 if name == "fp64" else 4]:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            for precise in ("tf32",) if narrow or name == "fp64" else ("tf32", "ieee"):
                chosen = constants | {"PRECISION": precise, "WIDE": False} | config.kwargs
                entries.append((_add_product_kernel, signature, chosen, options))
        entries.append((_add_product_kernel, signature, chosen | {"WIDE": True}, options))
    return entries


AOT = _ahead_of_time()
