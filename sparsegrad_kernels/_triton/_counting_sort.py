"""A stable counting sort inside a kernel, as tasks of `_dataflow.py`.

The entries are cut into parts. First each part's keys are counted; then, a block of keys a task,
the counts become places: smaller keys first, then earlier parts; then each part's entries are put
in their places, in their order. The work is `n_keys * n_parts` counts, and CHUNK comparisons for
each entry; the parts are few, so that the counts stay small beside the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._common import INTERPRETING
from ._dataflow import signal, wait

CHUNK = tl.constexpr(128)  # entries that are compared with each other,
# each with so many at a time: few registers, and in the interpreter few steps.
COMPARED = tl.constexpr(32 if INTERPRETING else 8)
MAX_PARTS = tl.constexpr(128)
KEYS = tl.constexpr(8)  # whose counts one task turns into places,
TOTALS = tl.constexpr(1024)  # behind the totals of smaller keys, so many at a time
# Flags, each signalled by the tasks of one kind.
COUNTED = tl.constexpr(0)
OFFSET = tl.constexpr(1)
PLACED = tl.constexpr(2)


@triton.jit
def _entries(part, n_parts, n):
    """The part's first entry, and the first that is not its own."""
    size = tl.cdiv(tl.cdiv(n, CHUNK), n_parts) * CHUNK
    begin = part.to(tl.int64) * size
    return begin, tl.minimum(begin + size, n)


@triton.jit
def _count(part, keys, key_stride, n, n_parts, totals, counts):
    """`counts[key, part]`, and `totals` of KEYS keys and all parts."""
    begin, end = _entries(part, n_parts, n)
    for first in range(begin, end, CHUNK):
        e = first + tl.arange(0, CHUNK)
        key = tl.load(keys + e * key_stride, mask=e < end, other=0).to(tl.int64)
        tl.atomic_add(counts + key * n_parts + part, 1, mask=e < end, sem="relaxed")
        tl.atomic_add(totals + key // KEYS, 1, mask=e < end, sem="relaxed")


@triton.jit
def _offsets(block, n_keys, n_parts, totals, counts, starts, present):
    """Each of `counts` becomes the place of the part's first entry with that key."""
    smaller = tl.zeros((TOTALS,), dtype=tl.int64)
    for first in range(0, block, TOTALS):
        other = first + tl.arange(0, TOTALS)
        smaller += tl.load(totals + other, mask=other < block, other=0)
    key = block * KEYS + tl.arange(0, KEYS)
    part = tl.arange(0, MAX_PARTS)
    cell = counts + key.to(tl.int64)[:, None] * n_parts + part[None, :]
    mask = (key < n_keys)[:, None] & (part < n_parts)[None, :]
    count = tl.load(cell, mask=mask, other=0)  # [KEYS, MAX_PARTS]

    of_key = tl.sum(count, 1)
    start = tl.sum(smaller, 0) + tl.cumsum(of_key, 0) - of_key

    tl.store(cell, start[:, None] + tl.cumsum(count, 1) - count, mask=mask)
    if starts is not None:
        tl.store(starts + key, start, mask=key < n_keys)
    if present is not None:
        tl.store(present + key, tl.where(of_key > 0, key, -1), mask=key < n_keys)


@triton.jit
def _place(
    part, keys, key_stride, others, other_stride, values, value_stride, n, n_parts,
    offsets, sorted_keys, sorted_others, sorted_values,
):  # fmt: skip
    """Each entry goes to its key's place in `offsets`, which moves on behind it."""
    begin, end = _entries(part, n_parts, n)
    lane = tl.arange(0, CHUNK)
    for first in range(begin, end, CHUNK):
        e = first + lane
        mask = e < end
        key = tl.load(keys + e * key_stride, mask=mask, other=-1).to(tl.int32)

        before = tl.zeros((CHUNK, COMPARED), dtype=tl.int32)
        behind = tl.zeros((CHUNK, COMPARED), dtype=tl.int32)
        n_here = tl.minimum(end - first, CHUNK).to(tl.int32)
        for start in range(0, n_here, COMPARED):
            to = start + tl.arange(0, COMPARED)
            to_key = tl.load(keys + (first + to) * key_stride, mask=to < n_here, other=-1)
            same = key[:, None] == to_key.to(tl.int32)[None, :]
            before += (same & (to[None, :] < lane[:, None])).to(tl.int32)
            behind += (same & (to[None, :] > lane[:, None])).to(tl.int32)
        last = mask & (tl.sum(behind, 1) == 0)

        cell = offsets + key.to(tl.int64) * n_parts + part
        place = tl.load(cell, mask=mask, other=0) + tl.sum(before, 1)
        other = tl.load(others + e * other_stride, mask=mask, other=0)
        value = tl.load(values + e * value_stride, mask=mask, other=0.0)
        if sorted_keys is not None:
            tl.store(sorted_keys + place, key, mask=mask)
        tl.store(sorted_others + place, other.to(sorted_others.dtype.element_ty), mask=mask)
        tl.store(sorted_values + place, value, mask=mask)
        tl.debug_barrier()  # every thread has read `offsets`
        tl.store(cell, place + 1, mask=last)
        tl.debug_barrier()


@triton.jit
def sort_task(
    task, keys, key_stride, others, other_stride, values, value_stride, n, n_keys, n_parts,
    flags, totals, counts, sorted_keys, sorted_others, sorted_values, starts, present,
):  # fmt: skip
    """One of the `n_tasks` of a sort, of entries (key, other, value), sorted by key.

    Args:
        keys, others: integers; keys in [0, n_keys).
        flags, totals, counts: zeroed; `flags + PLACED` is signalled `n_parts` times at the end.
        sorted_keys: or None; `sorted_keys`, `sorted_others` and `sorted_values` are the result.
        starts, present: or None; of each key its first entry's place, and the key itself, or -1
            where no entry has it.
    """
    n_blocks = tl.cdiv(n_keys, KEYS)
    if task < n_parts:
        _count(task, keys, key_stride, n, n_parts, totals, counts)
        signal(flags + COUNTED)
    elif task < n_parts + n_blocks:
        wait(flags + COUNTED, n_parts)
        _offsets(task - n_parts, n_keys, n_parts, totals, counts, starts, present)
        signal(flags + OFFSET)
    else:
        wait(flags + OFFSET, n_blocks)
        _place(
            task - n_parts - n_blocks, keys, key_stride, others, other_stride,
            values, value_stride, n, n_parts, counts, sorted_keys, sorted_others, sorted_values,
        )  # fmt: skip
        signal(flags + PLACED)


class Sort(NamedTuple):
    """How `n` entries with `n_keys` keys are sorted."""

    n_parts: int
    n_tasks: int
    sizes: tuple[int, int, int]  # of what `zeroed` makes: flags, totals, counts


def sort_of(n: int, n_keys: int) -> Sort:
    n_parts = min(MAX_PARTS.value, triton.cdiv(n, 2 * CHUNK.value))
    n_blocks = triton.cdiv(n_keys, KEYS.value)
    return Sort(n_parts, 2 * n_parts + n_blocks, (3, n_blocks, n_keys * n_parts))
