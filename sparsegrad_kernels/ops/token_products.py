"""What a layer's backward pass makes of the tokens that have a gradient, all at once.

Private: `_gradient.py` uses it where one kernel finds the tokens for all three results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define
from .sparse_dense_mm import sparse_dense_mm


def _reference(
    g: Tensor, x: Tensor | None, weight: Tensor | None, wants_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = g.new_empty(0) if weight is None else sparse_dense_mm(g, weight)
    product = g.new_empty(0) if x is None else sparse_dense_mm(g.T, x)
    wide = torch.promote_types(g.dtype, torch.float32)
    total = g.sum(0, dtype=wide) if wants_sum else g.new_empty(0, dtype=wide)
    return grad_input, product, total


def _fake(
    g: Tensor, x: Tensor | None, weight: Tensor | None, wants_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = g.new_empty(0) if weight is None else g.new_empty(g.shape[0], weight.shape[1])
    product = g.new_empty(0) if x is None else g.new_empty(g.shape[1], x.shape[1])
    wide = torch.promote_types(g.dtype, torch.float32)
    return grad_input, product, g.new_empty(g.shape[1] if wants_sum else 0, dtype=wide)


token_products = define(
    "_token_products(Tensor g, Tensor? x, Tensor? weight, bool wants_sum)"
    " -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
"""`g W [T, in]`, `g^T x [out, in]`, sum of g `[out]`; g is `[T, out]`, x `[T, in]`, W `[out, in]`.

Tokens whose `g` is zero take no part. What is not asked for, by None or False, is empty. The sum is
in float32 or wider, as are the sums of the products.
"""
