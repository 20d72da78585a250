"""Nonzero rows and columns of a matrix: one read that sets flags, then a scan of the flags."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETING, implement, needs_int64
from ._scalars import float64_bits, from_bits


@triton.jit(do_not_specialize=["tol_bits", "bucket"])
def _flag(
    a_ptr,  # [outer, inner], inner the dimension of the smaller stride
    outer_flags_ptr,  # [outer] int8, zeros
    inner_flags_ptr,  # [inner] int8, zeros
    outer,
    inner,
    outer_stride,
    inner_stride,
    tol_bits,
    bucket,  # of sizes: only chooses the tuning
    HAS_TOL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """outer_flags[i] = any_j not |a[i, j]| <= tol, inner_flags[j] = any_i not |a[i, j]| <= tol.

    One tile a program. Programs that share a flag all write the same 1, in any order.
    """
    # Shapes: neighbouring programs read neighbouring tiles of the same rows.
    index = tl.int64 if WIDE else tl.int32
    tiles = tl.cdiv(inner, BLOCK_INNER)
    tile_outer = (tl.program_id(0) // tiles).to(index)
    tile_inner = (tl.program_id(0) % tiles).to(index)
    i = tile_outer * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
    j = tile_inner * BLOCK_INNER + tl.arange(0, BLOCK_INNER)

    # Load.
    dtype = a_ptr.dtype.element_ty
    offsets = i[:, None] * outer_stride + j[None, :] * inner_stride
    inside = (i < outer)[:, None] & (j < inner)[None, :]
    a = tl.load(a_ptr + offsets, mask=inside, other=0.0)  # [BLOCK_OUTER, BLOCK_INNER]

    # Compute: NaN is neither equal to 0 nor below tol.
    if HAS_TOL:
        # Widened: exact, and comparisons of narrow types are not native everywhere.
        wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
        # Rounded to the dtype of `a`, by way of float32, as PyTorch does with a Python number.
        tol = from_bits(tol_bits).to(wide)
        if dtype == tl.bfloat16:  # to nearest even, by hand: the interpreter's cast truncates
            bits = tol.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            tol = bits.to(tl.float32, bitcast=True)
        else:
            tol = tol.to(dtype).to(wide)
        below = tl.abs(a.to(wide)) <= tol
    else:
        # By the bits, all but the sign's: nothing may take the smallest numbers for zero.
        if dtype.primitive_bitwidth == 64:
            below = (a.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) == 0
        elif dtype.primitive_bitwidth == 32:
            below = (a.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == 0
        else:
            below = (a.to(tl.int16, bitcast=True) & 0x7FFF) == 0
    hit = tl.where(below | (inside == 0), 0, 1)
    outer_hit = tl.max(hit, 1)  # [BLOCK_OUTER]
    inner_hit = tl.max(hit, 0)  # [BLOCK_INNER]

    # Store.
    tl.store(outer_flags_ptr + i, outer_hit.to(tl.int8), mask=outer_hit != 0)
    tl.store(inner_flags_ptr + j, inner_hit.to(tl.int8), mask=inner_hit != 0)


@triton.jit
def _compact(
    row_flags_ptr,  # [b] int8
    col_flags_ptr,  # [c] int8
    rows_ptr,  # [b]
    cols_ptr,  # [c]
    counts_ptr,  # [2]
    b,
    c,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows = (i : row_flags[i]), -1, -1, ...; the same for cols; counts = how many of each.

    One program for the rows, one for the columns.
    """
    if tl.program_id(0) == 0:
        _compact_one(row_flags_ptr, rows_ptr, counts_ptr, b, WIDE, BLOCK)
    else:
        _compact_one(col_flags_ptr, cols_ptr, counts_ptr + 1, c, WIDE, BLOCK)


@triton.jit
def _compact_one(flags_ptr, out_ptr, count_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.int64 if WIDE else tl.int32
    out_type = out_ptr.dtype.element_ty
    # Block by block: a flag's slot is the number of flags set before it.
    lanes = tl.arange(0, BLOCK).to(index)
    count = tl.zeros((), index)
    first = tl.zeros((), index)
    for _ in range(tl.cdiv(n, BLOCK)):
        i = first + lanes
        flags = tl.load(flags_ptr + i, mask=i < n, other=0).to(tl.int32)  # [BLOCK]
        slots = count + tl.cumsum(flags, 0) - flags
        tl.store(out_ptr + slots, i.to(out_type), mask=flags != 0)
        count += tl.sum(flags, 0)
        first += BLOCK
    tl.store(count_ptr, count.to(count_ptr.dtype.element_ty))

    # The slots left over.
    first = count
    for _ in range(tl.cdiv(n - count, BLOCK)):
        i = first + lanes
        tl.store(out_ptr + i, tl.full((BLOCK,), -1, out_type), mask=i < n)
        first += BLOCK


# (BLOCK_OUTER, BLOCK_INNER, num_warps): tiles of 4096 to 16384 entries, so that 2048 x 3072 has
# hundreds of programs; 128 or more along the contiguous dimension, whole cache lines of any dtype.
# Wider tiles write fewer flags of rows, taller ones fewer flags of columns.
CONFIGS = [(32, 128, 4), (64, 128, 4), (32, 256, 8), (64, 256, 8), (16, 512, 8)]
DEFAULT = CONFIGS[0]
SCAN_BLOCK = 4096
SCAN_WARPS = 8

_tuned_flag = (
    _flag
    if INTERPRETING
    else triton.autotune(
        [
            triton.Config({"BLOCK_OUTER": o, "BLOCK_INNER": i}, num_warps=warps)
            for o, i, warps in CONFIGS
        ],
        key=["bucket"],
    )(_flag)
)


def padded_indices(a: Tensor, tol: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`compact_indices` with indices and counts of the given integer dtype."""
    b, c = a.shape
    rows, cols = a.new_empty(b, dtype=dtype), a.new_empty(c, dtype=dtype)
    counts = a.new_empty(2, dtype=dtype)
    # One buffer, the columns' part aligned as the rows' is.
    start = triton.cdiv(b, 16) * 16
    flags = a.new_zeros(start + c, dtype=torch.int8)
    row_flags, col_flags = flags[:b], flags[start:]
    wide = needs_int64(a) or max(b, c) >= 2**31 - 2**16  # a block may reach past the last index

    if a.numel():
        # The dimension of the smaller stride inside: a transposed view is read as it lies.
        if a.stride(1) <= a.stride(0):
            sides = (row_flags, col_flags, b, c, a.stride(0), a.stride(1))
        else:
            sides = (col_flags, row_flags, c, b, a.stride(1), a.stride(0))
        outer, inner = sides[2:4]
        tile = {"BLOCK_OUTER": DEFAULT[0], "BLOCK_INNER": DEFAULT[1]} if INTERPRETING else {}
        _tuned_flag[
            lambda meta: (
                triton.cdiv(outer, meta["BLOCK_OUTER"]) * triton.cdiv(inner, meta["BLOCK_INNER"]),
            )
        ](
            a,
            *sides,
            float64_bits(tol),
            a.numel().bit_length(),
            HAS_TOL=tol != 0,
            WIDE=wide,
            **tile,
        )
    _compact[(2,)](
        row_flags, col_flags, rows, cols, counts, b, c, wide, SCAN_BLOCK, num_warps=SCAN_WARPS
    )
    return rows, cols, counts


@implement("compact_indices")
def compact_indices(a: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    return padded_indices(a, tol, torch.int32)


def _flag_aot(dtype: str, wide: bool, has_tol: bool, config: tuple[int, int, int]):
    block_outer, block_inner, num_warps = config
    integers = ("outer", "inner", "outer_stride", "bucket")
    return (
        _flag,
        {
            "a_ptr": f"*{dtype}",
            "outer_flags_ptr": "*i8",
            "inner_flags_ptr": "*i8",
            **dict.fromkeys(integers, "i32"),
            "inner_stride": "constexpr",
            "tol_bits": "i64",
            **dict.fromkeys(("HAS_TOL", "WIDE", "BLOCK_OUTER", "BLOCK_INNER"), "constexpr"),
        },
        {
            "inner_stride": 1,
            "HAS_TOL": has_tol,
            "WIDE": wide,
            "BLOCK_OUTER": block_outer,
            "BLOCK_INNER": block_inner,
        },
        {"num_warps": num_warps, "num_stages": 3},
    )


def _compact_aot(index: str, wide: bool):
    return (
        _compact,
        {
            "row_flags_ptr": "*i8",
            "col_flags_ptr": "*i8",
            **dict.fromkeys(("rows_ptr", "cols_ptr", "counts_ptr"), f"*{index}"),
            "b": "i32",
            "c": "i32",
            "WIDE": "constexpr",
            "BLOCK": "constexpr",
        },
        {"WIDE": wide, "BLOCK": SCAN_BLOCK},
        {"num_warps": SCAN_WARPS, "num_stages": 3},
    )


AOT = [
    *(
        _flag_aot(dtype, False, True, config)
        for dtype in ("fp32", "fp64", "bf16", "fp16")
        for config in CONFIGS
    ),
    _flag_aot("bf16", False, False, DEFAULT),
    _flag_aot("bf16", True, True, DEFAULT),
    *(_compact_aot(index, wide) for index in ("i32", "i64") for wide in (False, True)),
]
