"""`topk_coo`: a sample says about where the k-th largest lies, one read collects what may be kept.

Exact whatever the sample: with fewer than k candidates, or more than there is room for, selection
looks at the matrix again instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import implement
from ._radix import (
    BASE,
    BITS,
    DONE,
    INEXACT,
    KEY_BITS,
    LOWER,
    RANK,
    REPLICAS,
    REREAD,
    SAMPLE,
    SAMPLE_BITS,
    TOTAL,
    bracket_kth,
    collect_tile,
    count_bins,
    find_bin,
    is_last,
    magnitude_key,
)
from ._select import (
    COLLECTED,
    SAMPLED,
    Candidates,
    Segments,
    compiled_ahead,
    select,
    selection_ahead,
)

SAMPLE_SIZE = 2**17
CLUSTER = 8  # neighbours sampled together: a sector of memory
SAMPLE_BLOCK = 1024
WIDTH = 128
# Segments of a program's tile.
COLLECT = {"SEGMENTS": 16, "num_warps": 4}


@triton.jit
def sample_kernel(
    c, state, cols, numel, stride_row, stride_col, n_clusters, step, rank,
    BLOCK: tl.constexpr, CLUSTER: tl.constexpr, KEY_BITS: tl.constexpr, SAMPLE_BITS: tl.constexpr,
    INT64: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """LOWER = lower edge of the bin of the rank-th largest of the sample.

    A cluster of neighbours is taken from every `step` entries, at a place that varies irregularly.
    """
    dtype: tl.constexpr = state.dtype.element_ty
    BINS: tl.constexpr = 1 << SAMPLE_BITS
    active = True
    if GATED:
        active = tl.load(state + INEXACT) != 0
    if active:
        sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        cluster = sample // CLUSTER
        jitter = (cluster.to(tl.uint32) * 2654435761) >> 8
        place = (jitter.to(tl.int32) & 0xFFFFFF) % (step - CLUSTER + 1)
        if INT64:
            cluster = cluster.to(tl.int64)
        linear = cluster * step + place + sample % CLUSTER
        inside = (cluster < n_clusters) & (linear < numel)
        row = linear // cols
        at = row * stride_row + (linear - row * cols) * stride_col
        value = tl.load(c + at, mask=inside, other=0)
        bins = (magnitude_key(value) >> (KEY_BITS - SAMPLE_BITS)).to(tl.int32)
        histogram = state + SAMPLE
        replica = tl.program_id(0) % REPLICAS
        count_bins(histogram + replica * BINS, bins, inside, BINS)
        if is_last(state + DONE + SAMPLED, tl.num_programs(0)):
            found, _ = find_bin(histogram, rank, BINS, REPLICAS)
            tl.store(state + LOWER, found.to(dtype) << (KEY_BITS - SAMPLE_BITS))


@triton.jit
def collect_kernel(
    c, state, values, columns, offsets, counts, capacity, k, rows, cols, numel, per_row,
    stride_row, stride_col,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, INT64: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Candidates: the entries with key >= LOWER, each segment's in order."""
    dtype: tl.constexpr = state.dtype.element_ty
    active = True
    if GATED:
        active = tl.load(state + INEXACT) != 0
    if active:
        block = tl.program_id(0) // per_row
        part = tl.program_id(0) - block * per_row
        row = block * SEGMENTS + tl.arange(0, SEGMENTS)
        col = part * WIDTH + tl.arange(0, WIDTH)
        if INT64:
            row, col = row.to(tl.int64), col.to(tl.int64)
        exists = row < rows
        linear = row[:, None] * cols + col[None, :]
        inside = exists[:, None] & (col < cols)[None, :] & (linear < numel)
        at = row[:, None] * stride_row + col[None, :] * stride_col
        value = tl.load(c + at, mask=inside, other=0)  # [SEGMENTS, WIDTH]
        lower = tl.load(state + LOWER)
        collect_tile(
            value, inside, row * per_row + part, exists, lower.to(magnitude_key(value).dtype),
            state, values, columns, offsets, counts, capacity, KEY_BITS,
        )  # fmt: skip
        if is_last(state + DONE + COLLECTED, tl.num_programs(0)):
            if tl.load(state + TOTAL, cache_modifier=".cg") >= k:
                bracket_kth(state, k, lower, KEY_BITS)
            else:
                tl.store(state + REREAD, tl.full((), 1, dtype))
                tl.store(state + BASE, tl.full((), 0, dtype))
                tl.store(state + BITS, tl.full((), KEY_BITS, dtype))
                tl.store(state + RANK, tl.full((), k, dtype))


def sample_plan(numel: int, k: int) -> tuple[int, int, int]:
    """How many clusters, every how many entries, and the rank in the sample to cut at.

    Of `p` expected above the k-th, four standard deviations more if clusters are all alike.
    """
    if numel <= SAMPLE_SIZE:
        return triton.cdiv(numel, CLUSTER), CLUSTER, k
    n_clusters = SAMPLE_SIZE // CLUSTER
    p = k * SAMPLE_SIZE / numel
    rank = math.ceil(p + 4 * math.sqrt(CLUSTER * p) + 4 * CLUSTER)
    return n_clusters, numel // n_clusters, min(rank, SAMPLE_SIZE)


def room(numel: int, k: int) -> int:
    """For how many candidates: several times those expected, for what sampling cannot foresee."""
    expected = -(-sample_plan(numel, k)[2] * numel // min(numel, SAMPLE_SIZE))
    return 4 * max(expected, 2 * k)


def collect(segments: Segments, candidates: Candidates, gated: bool) -> None:
    """Sample and collect; `gated`: only if the state's INEXACT says so."""
    matrix, state, numel = segments.matrix, candidates.state, segments.matrix.numel()
    n_clusters, step, rank = sample_plan(numel, segments.k)
    shared = {"KEY_BITS": KEY_BITS[matrix.dtype], "INT64": segments.int64, "GATED": gated}
    sample_kernel[(triton.cdiv(n_clusters * CLUSTER, SAMPLE_BLOCK),)](
        matrix, state, segments.cols, numel, *segments.strides, n_clusters, step, rank,
        BLOCK=SAMPLE_BLOCK, CLUSTER=CLUSTER, SAMPLE_BITS=SAMPLE_BITS[matrix.dtype], **shared,
    )  # fmt: skip
    grid = (triton.cdiv(segments.rows, COLLECT["SEGMENTS"]) * segments.per_row,)
    collect_kernel[grid](
        matrix, state, *candidates.buffers, candidates.capacity, segments.k,
        segments.rows, segments.cols, numel, segments.per_row, *segments.strides,
        WIDTH=segments.width, **COLLECT, **shared,
    )  # fmt: skip


def everything(c: Tensor) -> tuple[Tensor, Tensor]:
    linear = torch.arange(c.numel(), device=c.device)
    width = max(c.shape[1], 1)
    indices = torch.stack([linear.div(width, rounding_mode="floor"), linear % width])
    values = c.new_empty(c.numel())
    values.view(c.shape).copy_(c)
    return indices, values


@implement("topk_coo")
def topk_coo(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    numel = c.numel()
    if k >= numel:
        return everything(c)
    segments = Segments(c, k, WIDTH, flat=c.is_contiguous())
    candidates = Candidates(segments, room(numel, k))
    collect(segments, candidates, gated=False)
    return select(segments, candidates)


def collection_ahead(dtype: torch.dtype, int64: bool, width: int, gated: bool) -> list[Any]:
    shared: dict[str, Any] = {"KEY_BITS": KEY_BITS[dtype], "GATED": gated}
    return [
        compiled_ahead(
            sample_kernel, dtype, int64, BLOCK=SAMPLE_BLOCK, CLUSTER=CLUSTER,
            SAMPLE_BITS=SAMPLE_BITS[dtype], num_warps=4, **shared,
        ),
        compiled_ahead(collect_kernel, dtype, int64, WIDTH=width, **COLLECT, **shared),
    ]  # fmt: skip


AOT = [
    item
    for dtype, int64 in [*((dtype, False) for dtype in KEY_BITS), (torch.float32, True)]
    for item in collection_ahead(dtype, int64, WIDTH, False)
    + selection_ahead(dtype, int64, WIDTH, False)
]
