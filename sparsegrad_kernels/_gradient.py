"""The arithmetic of a SparseGrad layer's backward pass and fold.

Where the host knows how many tokens have a gradient (references and C++ kernels, which return only
what is there), it gathers those and picks the cheapest order of products for them. On a GPU asking
for that number would stop the host until the device has caught up, so there the number stays on the
device: shapes are those of all tokens, and the kernels skip what is zero.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops._library import has_kernel, is_sync_free
from .ops.take_entries_ import take_entries_
from .ops.token_products import token_products
from .ops.topk_coo import select


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    k: int,
    size: list[int],
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    threshold: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input `[..., in]`, sparse parameter and bias `[out]`; None where not asked for.

    The input gradient is asked for by giving `weight`; the sparse one, of the given size and dtype,
    by giving `x`; the bias's, in the original space in both weight spaces, by its dtype. Tokens
    whose output gradient is zero (padding) take no part. `threshold` is that of
    `ops.grad_weight_topk`.
    """
    out_shape = g.shape[:-1]
    g = g.reshape(-1, g.shape[-1])  # [T, out]
    if x is not None:
        x = x.reshape(-1, x.shape[-1])  # [T, in]
    weight, u, v = (None if t is None else t.to(g.dtype) for t in (weight, u, v))
    fused = has_kernel("_token_products", g)
    make = _make_fused if fused else _make_sync_free if is_sync_free(g) else _make
    asked = _Asked(g, x, weight, u, v, k, bias_dtype is not None, threshold)
    grad_input, entries, grad_bias = make(asked)
    if grad_input is not None:
        grad_input = grad_input.reshape(*out_shape, grad_input.shape[1])
    grad_sparse = None
    if entries is not None:
        indices, values = entries
        grad_sparse = torch.sparse_coo_tensor(
            indices, values.to(dtype), size, is_coalesced=True, check_invariants=False
        )
    if grad_bias is not None:
        grad_bias = grad_bias.to(bias_dtype)
    return grad_input, grad_sparse, grad_bias


class _Asked(NamedTuple):
    """Matrices of all tokens, in one dtype; a gradient is made where what it needs is not None."""

    g: Tensor
    x: Tensor | None
    weight: Tensor | None
    u: Tensor | None
    v: Tensor | None
    k: int
    wants_bias: bool
    threshold: Tensor | None


# Gradient of the input `[T, in]`, entries of the sparse one, and gradient of the bias `[out]`.
_Gradients = tuple[Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None]


def _make(asked: _Asked) -> _Gradients:
    """Of the tokens that take part alone, which the host knows."""
    g, x, weight, u, v, k, wants_bias, _ = asked
    n_tokens, rows = g.shape[0], ops.nonzero_rows_cols(g)[0]
    is_part = rows.shape[0] < n_tokens
    if is_part:
        g = g.index_select(0, rows)
        x = None if x is None else x.index_select(0, rows)
    grad_input = None if weight is None else g @ weight
    if grad_input is not None and is_part:
        whole = grad_input.new_zeros(n_tokens, grad_input.shape[1])
        grad_input = whole.index_copy_(0, rows, grad_input)
    entries = None if x is None else rotated_grad_topk(g, x, u, v, k)
    return grad_input, entries, g.sum(0) if wants_bias else None


def _make_sync_free(asked: _Asked) -> _Gradients:
    """By operators that find the tokens for themselves."""
    g, x, weight, u, v, k, wants_bias, threshold = asked
    grad_input = None if weight is None else ops.sparse_dense_mm(g, weight)
    entries = None if x is None else sync_free_rotated_grad_topk(g, x, u, v, k, threshold)
    return grad_input, entries, g.sum(0) if wants_bias else None


def _make_fused(asked: _Asked) -> _Gradients:
    """By one operator for all products of tokens, which finds these once."""
    g, x, weight, u, v, k, wants_bias, threshold = asked
    v_first = u_first = False
    right = None
    if x is not None:
        v_first, u_first = _rotated_first(g.shape[0], g.shape[1], x.shape[1], u, v)
        right = x if u is None or not u_first else x @ u.T
    grad_input, product, grad_bias = token_products(
        g, None if v_first else right, weight, wants_bias
    )
    entries = None
    if right is not None:
        if v is not None and v_first:
            # So short a basis that finding the tokens once more would take longer.
            product = (g @ v.T).T @ right
        rotated = _rotate(product, None if u_first else u, None if v_first else v)
        entries = select(rotated, k, threshold)
    return None if weight is None else grad_input, entries, grad_bias if wants_bias else None


def _rotated_first(
    n: int, out: int, in_: int, u: Tensor | None, v: Tensor | None
) -> tuple[bool, bool]:
    """Whether V is multiplied by `g [n, out]`, and U by `x [n, in]`, before their product is made.

    Else it is by the product: what has the fewest multiply-adds, of bases that shorten enough.
    """
    r_out, r_in = None if v is None else v.shape[0], None if u is None else u.shape[0]
    return _cheapest_first(n, out, in_, r_out, r_in)


# Every layer asks in every step.
@functools.lru_cache(1024)
def _cheapest_first(
    n: int, out: int, in_: int, r_out: int | None, r_in: int | None
) -> tuple[bool, bool]:
    def cost(choice: tuple[bool, bool]) -> int:
        v_first, u_first = choice
        rows = r_out if v_first and r_out is not None else out
        cols = r_in if u_first and r_in is not None else in_
        total = n * ((out * rows if v_first else 0) + (in_ * cols if u_first else 0) + rows * cols)
        v_later, u_later = None if v_first else r_out, None if u_first else r_in
        if v_later is not None and u_later is not None:
            return total + _chain_cost(v_later, rows, cols, u_later)
        if v_later is not None:
            return total + v_later * rows * cols
        return total if u_later is None else total + rows * cols * u_later

    choices = [
        (v_first, u_first)
        for v_first in ((False,) if r_out is None else (False, True))
        for u_first in ((False,) if r_in is None else (False, True))
    ]
    return min(choices, key=cost)


def _rotate(product: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
    """`V product U^T`, in the cheaper order."""
    if u is None:
        return product if v is None else v @ product
    if v is None:
        return product @ u.T
    (out, in_), r_in, r_out = product.shape, u.shape[0], v.shape[0]
    if r_out * in_ * (out + r_in) <= out * r_in * (in_ + r_out):
        return (v @ product) @ u.T
    return v @ (product @ u.T)


def _chain_cost(a: int, b: int, c: int, d: int) -> int:
    """Multiply-adds of a product of matrices `[a, b] [b, c] [c, d]`, in the cheaper order."""
    return min(a * b * c + a * c * d, b * c * d + a * b * d)


def _cheapest(g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None) -> str:
    """Which factors the last product of `V g^T x U^T` has, at the fewest multiply-adds.

    "tokens": `(V g^T) (x U^T)`; "v": `V (g^T x U^T)`; "u": `(V g^T x) U^T`.
    """
    (n, out), in_ = g.shape, x.shape[1]
    r_in, r_out = in_ if u is None else u.shape[0], out if v is None else v.shape[0]
    costs = {"tokens": n * r_out * r_in}
    if v is not None:
        costs["tokens"] += n * out * r_out
        middle = out * n * in_ if u is None else _chain_cost(out, n, in_, r_in)
        costs["v"] = middle + r_out * out * r_in
    if u is not None:
        costs["tokens"] += n * in_ * r_in
        middle = out * n * in_ if v is None else _chain_cost(r_out, out, n, in_)
        costs["u"] = middle + r_out * in_ * r_in
    return min(costs, key=costs.__getitem__)


def rotated_grad_topk(
    g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest entries of `V g^T x U^T`, associated the cheapest way (design 2.1).

    Args:
        g: gradient of the output `[T, out]`, without its zero tokens.
        x: input `[T, in]`.
        u, v: `[r_in, in]` and `[r_out, out]`, or None: the identity.
        k: how many entries.

    Returns:
        `indices [2, k]` and `values [k]` in the transformed space.
    """
    last = _cheapest(g, x, u, v)
    if last == "v" and v is not None:
        right = g.T @ x if u is None else torch.linalg.multi_dot([g.T, x, u.T])
        return ops.grad_weight_topk(v.T, right, k)
    if last == "u" and u is not None:
        left = g.T @ x if v is None else torch.linalg.multi_dot([v, g.T, x])
        return ops.grad_weight_topk(left.T, u.T, k)
    left = g if v is None else g @ v.T
    right = x if u is None else x @ u.T
    return ops.grad_weight_topk(left, right, k)


def sync_free_rotated_grad_topk(
    g: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, k: int, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rotated_grad_topk` for `g` with its zero tokens, which the products skip by themselves.

    The selection is fused with the last product. The order is the cheapest for all tokens.
    """
    (n, out), in_ = g.shape, x.shape[1]
    last = _cheapest(g, x, u, v)
    if last == "v" and v is not None:
        left = v.T
        if u is None:
            right = ops.sparse_dense_mm(g.T, x)
        elif n * (in_ + out) * u.shape[0] < out * in_ * (n + u.shape[0]):
            right = ops.sparse_dense_mm(g.T, x @ u.T)
        else:
            right = ops.sparse_dense_mm(g.T, x) @ u.T
    elif last == "u" and u is not None:
        right = u.T
        if v is None:
            left = ops.sparse_dense_mm(g.T, x).T
        elif n * (in_ + out) * v.shape[0] < out * in_ * (n + v.shape[0]):
            left = ops.sparse_dense_mm(ops.sparse_dense_mm(g, v.T).T, x).T
        else:
            left = (v @ ops.sparse_dense_mm(g.T, x)).T
    else:
        left = g if v is None else ops.sparse_dense_mm(g, v.T)
        right = x if u is None else x @ u.T
    return ops.grad_weight_topk(left, right, k, threshold=threshold)


def fold_delta(
    weight: Tensor,
    delta: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    k: int,
    seed: Tensor | None = None,
) -> None:
    """`weight += V^T delta U`, then `delta` is zero, in place; about k entries are not zero.

    `delta` may have another dtype than the weight, which is the one that its update is made in.
    Where both `u` and `v` are bfloat16 and the weight is float32, the update is made in bfloat16 if
    a kernel is there for it. With a `seed` the weight is rounded stochastically, and the seed is
    another afterwards.
    """
    u, v = (None if factor is None else factor.to(weight.dtype) for factor in (u, v))
    if is_sync_free(delta):
        _sync_free_fold(weight, delta, u, v, k, seed)
    else:
        indices, values = take_entries_(delta)
        if indices.shape[1]:
            ops.fold_(weight, u, v, indices, values.to(weight.dtype), seed)
    if seed is not None:
        seed += 1


def _sync_free_fold(
    weight: Tensor,
    delta: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    k: int,
    seed: Tensor | None,
) -> None:
    # Room for k entries, which is all that one backward pass and a sparse optimizer write.
    indices = torch.nonzero_static(delta, size=k, fill_value=0).T
    entries = (indices[0], indices[1])
    is_real = torch.arange(k, device=delta.device) < torch.count_nonzero(delta)
    values = torch.where(is_real, delta[entries], 0)
    ops.fold_(weight, u, v, indices, values.to(weight.dtype), seed)
    # Others may have written more. Of what is left, mostly nothing, the products skip what is zero.
    delta.index_put_(entries, delta.new_zeros(()))
    rest = delta.to(weight.dtype)
    if u is not None:
        rest = ops.sparse_dense_mm(rest, u)
    if v is not None:
        rest = ops.sparse_dense_mm(rest.T, v).T
    weight += rest
    delta.zero_()
