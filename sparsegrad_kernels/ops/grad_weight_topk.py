"""The weight gradient `g^T x`, of which only the k entries of largest magnitude are made."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_k, check_like, check_matrix, check_tol
from ._library import define
from .sparse_dense_mm import sparse_dense_mm
from .topk_coo import carry_, check_threshold, topk_coo


def _reference(g: Tensor, x: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    return topk_coo(sparse_dense_mm(g.T, x, tol), k)


def _fake(g: Tensor, x: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    n = torch.sym_min(k, g.shape[1] * x.shape[1])
    return g.new_empty((2, n), dtype=torch.int64), g.new_empty(n)


_op = define(
    "grad_weight_topk(Tensor g, Tensor x, int k, float tol) -> (Tensor, Tensor)",
    _reference,
    _fake,
)


def _near_reference(
    g: Tensor, x: Tensor, k: int, tol: float, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    indices, values = grad_weight_topk(g, x, k, tol)
    carry_(threshold, values)
    return indices, values


def _near_fake(
    g: Tensor, x: Tensor, k: int, tol: float, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    return _fake(g, x, k, tol)


_near_op = define(
    "_grad_weight_topk_near(Tensor g, Tensor x, int k, float tol, Tensor(a!) threshold)"
    " -> (Tensor, Tensor)",
    _near_reference,
    _near_fake,
)


def grad_weight_topk(
    g: Tensor, x: Tensor, k: int, tol: float = 0.0, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`topk_coo(g.T @ x, k)` without the tokens and outputs whose `g` is zero (eq. 1 and 2).

    Args:
        g: gradient of the output `[T, out]`.
        x: input `[T, in]`, dtype and device of `g`.
        k: how many entries of the `[out, in]` product to keep.
        tol: magnitude at or below which an entry of `g` counts as zero.
        threshold: `[1]` float32 on the device of `g`, updated in place: keep one per weight from
            step to step, NaN at first. A little below the k-th magnitude (`SLACK` of the last
            step's), it lets a kernel drop most of the product unwritten. It never decides what the
            result is, only how fast: where it was wrong, or is NaN, infinite or not positive, the
            whole product is made.

    Returns:
        `indices [2, min(k, out * in)]` int64 in row-major order and their `values`, in the dtype of
        `g`, accumulated in float32 or wider.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device, `k < 1`, or a bad `tol`
            or `threshold`.
    """
    check_matrix("g", g)
    check_matrix("x", x)
    check_like("x", x, "g", g)
    check_k(k)
    check_tol(tol)
    if g.shape[0] != x.shape[0]:
        raise ValueError(f"x must have the {g.shape[0]} tokens of g, got {tuple(x.shape)}")
    if threshold is None:
        return _op(g, x, k, tol)
    check_threshold(threshold, "g", g)
    return _near_op(g, x, k, tol, threshold)
