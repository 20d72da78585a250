"""Radix selection of the k-th largest magnitude: keys, histograms, candidates.

A magnitude's bits, read as an integer (its key), have the magnitude's order. One call has one
zeroed `state`, int32 or int64: a few scalars, then the histograms. What must have been seen by
everybody before it is used is used by the last program of a launch, or by the next launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Scalars of the state.
LOWER = tl.constexpr(0)  # candidates are the entries with key >= LOWER
TOTAL = tl.constexpr(1)  # how many there are
BASE = tl.constexpr(2)  # the k-th largest key lies in [BASE, BASE + 2^BITS)
BITS = tl.constexpr(3)
RANK = tl.constexpr(4)  # it is the RANK-th largest there
REREAD = tl.constexpr(5)  # whether the candidates are fewer than k, hence of no use
INEXACT = tl.constexpr(6)  # whether a carried threshold let too few or too many through
DONE = tl.constexpr(8)  # per launch, how many programs are done
# Histograms.
DIGIT = tl.constexpr(13)
BINS = tl.constexpr(2**13)
REPLICAS = tl.constexpr(4)  # programs spread their counts over several: less contention
MAX_PASSES = 5
COARSE = tl.constexpr(32)
FINE = tl.constexpr(COARSE.value + REPLICAS.value * BINS.value)
SAMPLE = tl.constexpr(FINE.value + MAX_PASSES * BINS.value)

KEY_BITS = {torch.float64: 63, torch.float32: 31, torch.bfloat16: 15, torch.float16: 15}
# Highest bits of a key that the sample's histogram tells apart: all exponents, some mantissa.
SAMPLE_BITS = {torch.float64: 15, torch.float32: 12, torch.bfloat16: 12, torch.float16: 12}
# Passes which end at one key even if nothing is known of it.
PASSES = {dtype: -(-bits // DIGIT.value) for dtype, bits in KEY_BITS.items()}


@triton.jit
def magnitude_key(c):
    """Integers in the order of `abs(c)`, every NaN one above infinity."""
    dtype: tl.constexpr = c.dtype
    if dtype == tl.float64:
        bits = c.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        return tl.minimum(bits, 0x7FF0000000000001)
    elif dtype == tl.float32:
        bits = c.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.minimum(bits, 0x7F800001)
    else:
        bits = c.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        return tl.minimum(bits, 0x7F81 if dtype == tl.bfloat16 else 0x7C01)


@triton.jit
def magnitude_of(key, dtype: tl.constexpr):
    """The float32 magnitude whose key in `dtype` is `key`; NaN is returned as infinity."""
    if dtype == tl.float64:
        magnitude = key.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32)
    elif dtype == tl.float32:
        magnitude = key.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        magnitude = key.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.where(magnitude == magnitude, magnitude, float("inf"))


@triton.jit
def is_last(counter, n_programs):
    """Whether all other programs are done: then what they wrote can be read (past the L1)."""
    tl.debug_barrier()
    one = tl.full((), 1, counter.dtype.element_ty)
    return tl.atomic_add(counter, one, sem="acq_rel") == n_programs - 1


@triton.jit
def count_bins(histogram, bins, mask, n_bins: tl.constexpr):
    """`histogram[bin] += 1` for each; what is in the lowest bin, often all zeros, in one piece."""
    dtype: tl.constexpr = histogram.dtype.element_ty
    low = tl.min(tl.where(mask, bins, n_bins).to(tl.int32))
    n_low = tl.sum((mask & (bins == low)).to(tl.int32))
    tl.atomic_add(histogram + low, n_low.to(dtype), mask=low < n_bins, sem="relaxed")
    one = tl.full(bins.shape, 1, dtype)
    tl.atomic_add(histogram + bins, one, mask=mask & (bins != low), sem="relaxed")


@triton.jit
def find_bin(histogram, rank, n_bins: tl.constexpr, n_replicas: tl.constexpr):
    """The bin of the rank-th largest, and how many are in the bins above it."""
    CHUNK: tl.constexpr = 2048
    dtype: tl.constexpr = histogram.dtype.element_ty
    seen = tl.full((), 0, dtype)
    above = tl.full((), 0, dtype)
    found = tl.full((), 0, tl.int32)
    for chunk in range(n_bins // CHUNK):  # the highest bins first
        bins = n_bins - (chunk + 1) * CHUNK + tl.arange(0, CHUNK)
        counts = tl.load(histogram + bins, cache_modifier=".cg")
        for replica in tl.static_range(1, n_replicas):
            counts += tl.load(histogram + replica * n_bins + bins, cache_modifier=".cg")
        at_or_above = seen + tl.cumsum(counts, 0, reverse=True)
        found = tl.maximum(found, tl.max(tl.where(at_or_above >= rank, bins, 0)))
        above = tl.maximum(above, tl.max(tl.where(at_or_above < rank, at_or_above, 0)))
        seen += tl.sum(counts)
    return found, above


@triton.jit
def candidate_bins(relative, KEY_BITS: tl.constexpr):
    """Bins of `key - LOWER`: narrow ones for the first four octaves or more, then coarse ones."""
    NARROW: tl.constexpr = 42 if KEY_BITS == 63 else 13 if KEY_BITS == 31 else 0
    HALF: tl.constexpr = BINS // 2
    WIDE: tl.constexpr = KEY_BITS - DIGIT + 1
    bins = tl.where((relative >> NARROW) < HALF, relative >> NARROW, HALF + (relative >> WIDE))
    return bins.to(tl.int32)


@triton.jit
def collect_tile(
    c, inside, segment, exists, lower, state, values, columns, offsets, counts, capacity,
    KEY_BITS: tl.constexpr,
):  # fmt: skip
    """Append the entries `abs(c) >= lower` of `c [S, W]`, in order, to the candidates.

    Each row of the tile is a segment: W neighbours of one row of the matrix. `offsets[segment]` and
    `counts[segment]` say where its candidates are; -1: there was no room, look in the matrix.
    """
    dtype: tl.constexpr = state.dtype.element_ty
    key = magnitude_key(c)
    keep = inside & (key >= lower)
    ones = keep.to(tl.int32)
    per_segment = tl.sum(ones, 1)  # [S]
    total = tl.sum(per_segment, 0)
    start = tl.atomic_add(state + TOTAL, total.to(dtype), sem="relaxed")
    fits = start + total <= capacity
    begin = start + tl.cumsum(per_segment, 0) - per_segment  # [S]
    slot = begin[:, None] + tl.cumsum(ones, 1) - 1  # [S, W]
    column = tl.arange(0, c.shape[1])[None, :].to(tl.uint8)
    stored = keep & (slot < tl.where(fits, capacity, 0))
    tl.store(values + slot, c, mask=stored)
    tl.store(columns + slot, tl.broadcast_to(column, c.shape), mask=stored)
    tl.store(offsets + segment, begin.to(tl.int32), mask=exists)
    tl.store(counts + segment, tl.where(fits, per_segment, -1), mask=exists)
    bins = candidate_bins(tl.where(keep, key - lower, 0), KEY_BITS)
    replica = tl.program_id(0) % REPLICAS
    count_bins(state + COARSE + replica * BINS, bins, keep, BINS)


@triton.jit
def bracket_kth(state, k, lower, KEY_BITS: tl.constexpr):
    """Where the k-th largest key lies, from the candidates' histogram."""
    NARROW: tl.constexpr = 42 if KEY_BITS == 63 else 13 if KEY_BITS == 31 else 0
    HALF: tl.constexpr = BINS // 2
    WIDE: tl.constexpr = KEY_BITS - DIGIT + 1
    dtype: tl.constexpr = state.dtype.element_ty
    found, above = find_bin(state + COARSE, k, BINS, REPLICAS)
    edge = found.to(dtype)
    narrow = found < HALF
    edge = tl.where(narrow, edge << NARROW, (edge - HALF) << WIDE)
    tl.store(state + BASE, lower + edge)
    tl.store(state + BITS, tl.where(narrow, NARROW, WIDE).to(dtype))
    tl.store(state + RANK, (k - above).to(dtype))


@triton.jit
def forget_candidates(state):
    """The candidates of a carried threshold are not used: the state as before they were sought."""
    CHUNK: tl.constexpr = 2048
    zeros = tl.zeros((CHUNK,), state.dtype.element_ty)
    for start in range(0, REPLICAS * BINS, CHUNK):
        tl.store(state + COARSE + start + tl.arange(0, CHUNK), zeros)
    tl.store(state + TOTAL, tl.full((), 0, state.dtype.element_ty))
    tl.store(state + INEXACT, tl.full((), 1, state.dtype.element_ty))
