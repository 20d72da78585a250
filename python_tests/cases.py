"""Inputs and references that tests and benchmarks share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparsegrad_kernels import backends

# Whether Triton's kernels serve the CPU tensors of these tests.
INTERPRETING = backends()["triton"].loaded and os.environ.get("TRITON_INTERPRET") == "1"


def examples(n: int) -> int:
    """How many of `n` random examples to try: few where Triton's slow interpreter computes."""
    return n // 5 if INTERPRETING else n


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Relative error of one product, accumulated in float32 or wider and rounded once.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}

# [b, c]: odd, empty, thin.
SHAPES = ((1, 1), (7, 5), (33, 17), (64, 128), (1, 300), (300, 1), (0, 5), (5, 0), (0, 0))


def sparse_matrix(
    rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator, keep: float = 0.5
) -> Tensor:
    """Random, with about `keep` of the rows and of the columns nonzero, and holes in those."""
    a = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    a *= torch.rand(rows, 1, generator=generator) < keep
    a *= torch.rand(1, cols, generator=generator) < max(keep, 0.7)
    a *= torch.rand(rows, cols, generator=generator) < 0.8
    return a.to(dtype)


def strided_views(a: Tensor) -> dict[str, Tensor]:
    """The same matrix in several layouts."""
    rows, cols = a.shape
    wide = torch.full((2 * rows + 1, 3 * cols + 2), torch.nan, dtype=a.dtype, device=a.device)
    wide[1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3] = a
    return {
        "contiguous": a.contiguous(),
        "transposed": a.T.contiguous().T,
        "sliced": wide[1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3],
    }


def oracle_rows_cols(a: Tensor, tol: float = 0.0) -> tuple[list[int], list[int]]:
    """Entry by entry, in Python."""
    values = a.double().tolist()
    hit = [[not abs(value) <= tol for value in row] for row in values]
    cols = range(a.shape[1])
    return [i for i, row in enumerate(hit) if any(row)], [
        j for j in cols if any(row[j] for row in hit)
    ]


def oracle_topk(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By sorting everything: magnitude, NaN first, then the lower linear index."""
    flat = c.double().reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i] == flat[i], -abs(flat[i]), i))
    chosen = torch.tensor(sorted(order[:k]), dtype=torch.int64)
    width = max(c.shape[1], 1)
    return torch.stack([chosen // width, chosen % width]), c.reshape(-1)[chosen]


def orthogonal(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q.to(dtype)


def assert_close_to(actual: Tensor, oracle: Tensor, scale: Tensor | float) -> None:
    """`actual` within its dtype's tolerance of the float64 `oracle`, relative to `scale`."""
    error = (actual.double() - oracle).abs()
    finfo = torch.finfo(actual.dtype)
    # float16 is spaced evenly where products of two small numbers soon are.
    limit = TOLERANCE[actual.dtype] * scale + finfo.smallest_normal * finfo.eps
    assert bool((error <= limit + 1e-300).all()), f"error {error.max()} where {limit} is allowed"
