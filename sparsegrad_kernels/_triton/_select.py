"""The k largest among the candidates that segments of a matrix hold, in row-major order.

Three launches: refine (the k-th largest key, exactly), count (what each group of segments has above
it and equal to it), write. Segments whose candidates had no room are read from the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.topk_coo import SLACK
from ._common import needs_int64
from ._radix import (
    BASE,
    BINS,
    BITS,
    DIGIT,
    DONE,
    FINE,
    PASSES,
    RANK,
    REPLICAS,
    REREAD,
    SAMPLE,
    SAMPLE_BITS,
    count_bins,
    find_bin,
    is_last,
    magnitude_key,
    magnitude_of,
)

# Segments per program, entries of each looked at together: of 128, about 1 to 4 are candidates.
GROUP = {"SEGMENTS": 64, "ENTRIES": 8, "num_warps": 4}
KEPT = tl.constexpr(SLACK)
# Launches that count their finished programs, in the order of their counters.
SAMPLED, COLLECTED, COUNTED, NEARED, REFINED = (tl.constexpr(i) for i in range(5))


@triton.jit
def load_segments(
    group, state, offsets, counts, n_segments, per_row, cols, numel,
    WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Row, first column, number of entries, place of the candidates or -1, of each segment."""
    segment = group * SEGMENTS + tl.arange(0, SEGMENTS)
    if INT64:
        segment = segment.to(tl.int64)
    exists = segment < n_segments
    row = segment // per_row
    first = (segment - row * per_row) * WIDTH
    count = tl.load(counts + segment, mask=exists, other=0)
    reread = tl.where(tl.load(state + REREAD) != 0, -1, count) < 0
    length = tl.minimum(WIDTH, tl.minimum(cols - first, numel - (row * cols + first)))
    size = tl.where(exists, tl.where(reread, length, count), 0).to(tl.int32)
    offset = tl.load(offsets + segment, mask=exists & ~reread, other=-1)
    return row, first, size, offset


@triton.jit
def load_entries(
    start, row, first, size, offset, c, stride_row, stride_col, values, columns,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Entries `start` to `start + ENTRIES` of each segment: values, columns, whether there."""
    entry = start + tl.arange(0, ENTRIES)[None, :]
    inside = entry < size[:, None]
    stored = inside & (offset >= 0)[:, None]
    slot = offset[:, None] + entry
    candidate = tl.load(values + slot, mask=stored, other=0)
    column = tl.load(columns + slot, mask=stored, other=0).to(first.dtype) + first[:, None]
    at = row[:, None] * stride_row + (first[:, None] + entry) * stride_col
    value = tl.where(stored, candidate, tl.load(c + at, mask=inside & ~stored, other=0))
    column = tl.where(stored, column, first[:, None] + entry)  # [SEGMENTS, ENTRIES]
    return value, column, inside


@triton.jit
def refine_kernel(
    c, state, values, columns, offsets, counts, n_segments, per_row, cols, numel,
    stride_row, stride_col,
    PASS: tl.constexpr, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, ENTRIES: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """[BASE, BASE + 2^BITS) shrinks to the one of its 2^13 parts that holds the k-th largest."""
    bits = tl.load(state + BITS)
    if bits > 0:
        base = tl.load(state + BASE)
        shift = tl.maximum(bits - DIGIT, 0)
        row, first, size, offset = load_segments(
            tl.program_id(0), state, offsets, counts, n_segments, per_row, cols, numel,
            WIDTH, SEGMENTS, INT64,
        )  # fmt: skip
        histogram = state + FINE + PASS * BINS
        for start in range(0, tl.max(size), ENTRIES):
            value, _, inside = load_entries(
                start, row, first, size, offset, c, stride_row, stride_col, values, columns, ENTRIES
            )
            key = magnitude_key(value)
            relative = key - base.to(key.dtype)
            mask = inside & ((relative >> bits.to(key.dtype)) == 0)
            digit = tl.where(mask, relative >> shift.to(key.dtype), 0).to(tl.int32)
            count_bins(histogram, digit, mask, BINS)
        if is_last(state + DONE + REFINED + PASS, tl.num_programs(0)):
            rank = tl.load(state + RANK)
            found, above = find_bin(histogram, rank, BINS, 1)
            tl.store(state + BASE, base + (found.to(base.dtype) << shift))
            tl.store(state + BITS, shift)
            tl.store(state + RANK, rank - above)


@triton.jit
def count_entries(
    row, first, size, offset, threshold, c, stride_row, stride_col, values, columns,
    SEGMENTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """How many entries of each segment are above the threshold key, and equal to it."""
    n_above = tl.zeros((SEGMENTS,), tl.int32)
    n_equal = tl.zeros((SEGMENTS,), tl.int32)
    for start in range(0, tl.max(size), ENTRIES):
        value, _, inside = load_entries(
            start, row, first, size, offset, c, stride_row, stride_col, values, columns, ENTRIES
        )
        key = magnitude_key(value)
        n_above += tl.sum((inside & (key > threshold)).to(tl.int32), 1)
        n_equal += tl.sum((inside & (key == threshold)).to(tl.int32), 1)
    return n_above, n_equal


@triton.jit
def count_kernel(
    c, state, values, columns, offsets, counts, n_segments, per_row, cols, numel,
    stride_row, stride_col, group_above, group_equal,
    WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, ENTRIES: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """`group_above[i]`, `group_equal[i]`: entries above and equal to the k-th in groups < i."""
    SCAN: tl.constexpr = 1024
    dtype: tl.constexpr = state.dtype.element_ty
    group, n_groups = tl.program_id(0), tl.num_programs(0)
    threshold = tl.load(state + BASE)
    row, first, size, offset = load_segments(
        group, state, offsets, counts, n_segments, per_row, cols, numel, WIDTH, SEGMENTS, INT64
    )
    n_above, n_equal = count_entries(
        row, first, size, offset, threshold, c, stride_row, stride_col, values, columns,
        SEGMENTS, ENTRIES,
    )  # fmt: skip
    tl.store(group_above + group, tl.sum(n_above, 0).to(dtype))
    tl.store(group_equal + group, tl.sum(n_equal, 0).to(dtype))
    if is_last(state + DONE + COUNTED, n_groups):
        before_above = tl.full((), 0, dtype)
        before_equal = tl.full((), 0, dtype)
        for start in range(0, n_groups, SCAN):
            groups = start + tl.arange(0, SCAN)
            mask = groups < n_groups
            above = tl.load(group_above + groups, mask=mask, other=0, cache_modifier=".cg")
            equal = tl.load(group_equal + groups, mask=mask, other=0, cache_modifier=".cg")
            tl.store(group_above + groups, before_above + tl.cumsum(above, 0) - above, mask=mask)
            tl.store(group_equal + groups, before_equal + tl.cumsum(equal, 0) - equal, mask=mask)
            before_above += tl.sum(above, 0)
            before_equal += tl.sum(equal, 0)


@triton.jit
def write_kernel(
    c, state, values, columns, offsets, counts, n_segments, per_row, cols, numel,
    stride_row, stride_col, group_above, group_equal, out_indices, out_values, k, out_cols,
    carried,
    WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, ENTRIES: tl.constexpr, INT64: tl.constexpr,
    CARRY: tl.constexpr,
):  # fmt: skip
    """Entries above the k-th, and of its equals the first RANK, to their row-major places."""
    group = tl.program_id(0)
    threshold = tl.load(state + BASE)
    rank = tl.load(state + RANK)
    row, first, size, offset = load_segments(
        group, state, offsets, counts, n_segments, per_row, cols, numel, WIDTH, SEGMENTS, INT64
    )
    n_above, n_equal = count_entries(
        row, first, size, offset, threshold, c, stride_row, stride_col, values, columns,
        SEGMENTS, ENTRIES,
    )  # fmt: skip
    before_above = tl.load(group_above + group) + tl.cumsum(n_above, 0) - n_above  # [SEGMENTS]
    before_equal = tl.load(group_equal + group) + tl.cumsum(n_equal, 0) - n_equal
    place = before_above + tl.minimum(before_equal, rank)
    for start in range(0, tl.max(size), ENTRIES):
        value, column, inside = load_entries(
            start, row, first, size, offset, c, stride_row, stride_col, values, columns, ENTRIES
        )
        key = magnitude_key(value)
        equal = (inside & (key == threshold)).to(tl.int32)
        in_time = before_equal[:, None] + tl.cumsum(equal, 1) <= rank
        chosen = inside & ((key > threshold) | ((key == threshold) & in_time))
        ones = chosen.to(tl.int32)
        slot = place[:, None] + tl.cumsum(ones, 1) - 1
        linear = row[:, None].to(tl.int64) * cols + column
        out_row = linear // out_cols
        tl.store(out_indices + slot, out_row, mask=chosen)
        tl.store(out_indices + k + slot.to(tl.int64), linear - out_row * out_cols, mask=chosen)
        tl.store(out_values + slot, value, mask=chosen)
        place += tl.sum(ones, 1)
        before_equal += tl.sum(equal, 1)
    if CARRY and group == 0:
        tl.store(carried, magnitude_of(threshold, out_values.dtype.element_ty) * KEPT)


@dataclass(frozen=True)
class Segments:
    """A matrix cut into segments of `width` neighbours in a row, of which k entries are selected.

    Args:
        width: at most 256, for columns within a segment are bytes.
        flat: cut a contiguous matrix regardless of its rows, as if it were `width` wide.
    """

    matrix: Tensor
    k: int
    width: int
    flat: bool

    @property
    def rows(self) -> int:
        return -(-self.matrix.numel() // self.width) if self.flat else self.matrix.shape[0]

    @property
    def cols(self) -> int:
        return self.width if self.flat else self.matrix.shape[1]

    @property
    def strides(self) -> tuple[int, int]:
        return (self.width, 1) if self.flat else (self.matrix.stride(0), self.matrix.stride(1))

    @property
    def per_row(self) -> int:
        return -(-self.cols // self.width)

    @property
    def n_segments(self) -> int:
        return self.rows * self.per_row

    @cached_property
    def int64(self) -> bool:
        return needs_int64(self.matrix) or self.matrix.numel() >= 2**31 - 2**20


class Candidates:
    """The buffers of one selection."""

    def __init__(self, segments: Segments, capacity: int) -> None:
        matrix, dtype = segments.matrix, segments.matrix.dtype
        self.capacity = min(capacity, matrix.numel(), 2**31 - 2**20)
        integer = torch.int64 if dtype is torch.float64 or segments.int64 else torch.int32
        n_state = SAMPLE.value + REPLICAS.value * 2 ** SAMPLE_BITS[dtype]
        self.state = matrix.new_zeros(n_state, dtype=integer)
        self.values = matrix.new_empty(self.capacity)
        self.columns = matrix.new_empty(self.capacity, dtype=torch.uint8)
        self.offsets = matrix.new_empty(segments.n_segments, dtype=torch.int32)
        self.counts = matrix.new_empty(segments.n_segments, dtype=torch.int32)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return self.values, self.columns, self.offsets, self.counts


def select(
    segments: Segments, candidates: Candidates, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`indices [2, k]` and `values [k]`; `carried [1]` gets SLACK times the k-th magnitude."""
    matrix, state, k = segments.matrix, candidates.state, segments.k
    n_groups = triton.cdiv(segments.n_segments, GROUP["SEGMENTS"])
    indices = matrix.new_empty((2, k), dtype=torch.int64)
    values = matrix.new_empty(k)
    group_above = state.new_empty(n_groups)
    group_equal = state.new_empty(n_groups)
    arguments = (
        matrix, state, *candidates.buffers, segments.n_segments, segments.per_row, segments.cols,
        matrix.numel(), *segments.strides,
    )  # fmt: skip
    options: dict[str, Any] = dict(WIDTH=segments.width, INT64=segments.int64, **GROUP)
    grid = (n_groups,)
    for index in range(PASSES[matrix.dtype]):
        refine_kernel[grid](*arguments, PASS=index, **options)
    count_kernel[grid](*arguments, group_above, group_equal, **options)
    write_kernel[grid](
        *arguments, group_above, group_equal, indices, values, k, matrix.shape[1],
        carried if carried is not None else state,
        CARRY=carried is not None, **options,
    )  # fmt: skip
    return indices, values


def compiled_ahead(
    kernel: Any, dtype: torch.dtype, int64: bool, num_warps: int, **constexprs: Any
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """An item of an `AOT` list, the types of whose arguments follow from their names."""
    name = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}.get(dtype, "fp16")
    wide = "i64" if int64 else "i32"
    state = "*i64" if int64 or dtype is torch.float64 else "*i32"
    types = dict.fromkeys(("c", "a", "b", "dense", "values", "out_values"), f"*{name}")
    types |= dict.fromkeys(("state", "group_above", "group_equal"), state)
    types |= dict.fromkeys(("offsets", "counts", "inner", "kept"), "*i32")
    types |= dict.fromkeys(("capacity", "k", "rank"), "i32")
    types |= {"columns": "*u8", "out_indices": "*i64", "carried": "*fp32"}
    if "inner" in kernel.arg_names:
        types["rows"] = "*i32"
    if "INT64" in kernel.arg_names:
        constexprs["INT64"] = int64
    signature = {
        argument: types.get(argument, wide)
        for argument in kernel.arg_names
        if argument not in constexprs
    }
    return kernel, signature, constexprs, {"num_warps": num_warps, "num_stages": 1}


def selection_ahead(dtype: torch.dtype, int64: bool, width: int, carry: bool) -> list[Any]:
    fixed: dict[str, Any] = dict(WIDTH=width, **GROUP)
    return [
        *(
            compiled_ahead(refine_kernel, dtype, int64, PASS=index, **fixed)
            for index in range(PASSES[dtype])
        ),
        compiled_ahead(count_kernel, dtype, int64, **fixed),
        compiled_ahead(write_kernel, dtype, int64, CARRY=carry, **fixed),
    ]
