"""Sparse-by-dense product, eq. 1: `C = A[rows][:, cols] @ B[cols, :]`, scattered into zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_like, check_matrix, check_tol
from ._library import NAMESPACE, define
from .nonzero_rows_cols import nonzero_rows_cols


def check_product(a: Tensor, b: Tensor, tol: float) -> None:
    check_matrix("a", a)
    check_matrix("b", b)
    check_like("b", b, "a", a)
    check_tol(tol)
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"b must have as many rows as a has columns, {a.shape[1]}, got {tuple(b.shape)}"
        )


def compacted_product(a: Tensor, b: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """`rows [R]` and `C [R, d]` of eq. 1. Nothing is gathered where nothing is left out."""
    rows, cols = nonzero_rows_cols(a, tol)
    if rows.shape[0] < a.shape[0]:
        a = a[rows]
    if cols.shape[0] < a.shape[1]:
        a, b = a[:, cols], b[cols]
    return rows, a @ b


def _reference(a: Tensor, b: Tensor, tol: float) -> Tensor:
    rows, c = compacted_product(a, b, tol)
    if rows.shape[0] == a.shape[0]:
        return c
    return c.new_zeros(a.shape[0], b.shape[1]).index_copy_(0, rows, c)


def _fake(a: Tensor, b: Tensor, tol: float) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_op = define("sparse_dense_mm(Tensor a, Tensor b, float tol) -> Tensor", _reference, _fake)


def _setup_context(ctx, inputs, output) -> None:
    a, b, ctx.tol = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx, grad: Tensor):
    a, b = ctx.saved_tensors
    grad_a = grad @ b.T if ctx.needs_input_grad[0] else None
    grad_b = sparse_dense_mm(a.T, grad, ctx.tol) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None


torch.library.register_autograd(
    f"{NAMESPACE}::sparse_dense_mm", _backward, setup_context=_setup_context
)


def sparse_dense_mm(a: Tensor, b: Tensor, tol: float = 0.0) -> Tensor:
    """`a @ b` for `a` with few nonzero rows and columns (paper section 3.3, eq. 1).

    Rows and columns of `a` without an entry of `abs > tol` take no part: where they would meet
    Inf or NaN in `b` the result is 0. Differentiable, with the gradient of `a @ b`.

    Args:
        a: matrix `[b, c]`.
        b: matrix `[c, d]`, dtype and device of `a`.
        tol: magnitude at or below which an entry of `a` counts as zero.

    Returns:
        `[b, d]`, in the dtype of `a`, accumulated in float32 or wider.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device, or a bad `tol`.
    """
    check_product(a, b, tol)
    return _op(a, b, tol)
