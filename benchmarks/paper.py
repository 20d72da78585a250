"""The paper's layer as it describes it (Table 2): three products, each way, and torch.topk.

Nothing of this package's kernels is in it: it is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import torch_topk
from torch import Tensor, nn

from sparsegrad_kernels import Basis

Product = Callable[[Tensor, Tensor], Tensor]


def regular(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def sparse_by_dense(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1 in plain PyTorch: `C = A[rows][:, cols] @ B[cols, :]`, scattered into zeros."""
    mask = a != 0
    rows, cols = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    c = a.new_zeros(a.shape[0], b.shape[1])
    return c.index_copy_(0, rows, a[rows][:, cols] @ b[cols])


class _PaperFunction(torch.autograd.Function):
    """Computes in the dtype of `x`, as autocast would."""

    @staticmethod
    def forward(ctx, x, weight, bias, u, v, k, product):
        u, v, ctx.dtype = u.to(x.dtype), v.to(x.dtype), weight.dtype
        weight = weight.to(x.dtype)
        rotated = x @ u.T
        ctx.save_for_backward(rotated, weight, u, v)
        ctx.k, ctx.product, ctx.has_bias = k, product, bias is not None
        y = rotated @ weight.T @ v
        return y if bias is None else y + bias.to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        rotated, weight, u, v = ctx.saved_tensors
        product = ctx.product
        flat = g.reshape(-1, g.shape[-1])  # [T, out]
        g_rotated = product(flat, v.T)
        grad_input = product(product(g_rotated, weight), u).reshape(*g.shape[:-1], u.shape[1])
        dense = product(g_rotated.T, rotated.reshape(-1, rotated.shape[-1]))
        indices, values = torch_topk(dense, ctx.k)
        grad = torch.sparse_coo_tensor(
            indices, values.to(ctx.dtype), weight.shape, check_invariants=False
        )
        grad_bias = flat.sum(0).to(ctx.dtype) if ctx.has_bias else None
        return grad_input, grad, grad_bias, None, None, None, None


class PaperLinear(nn.Module):
    """`weight` is `W~ = V W U^T` and has a COO gradient: torch.optim.SparseAdam trains it."""

    def __init__(self, linear: nn.Linear, basis: Basis, k: int, product: Product = regular) -> None:
        super().__init__()
        basis = basis.matching(linear.weight)
        self.basis, self.k, self.product = basis, k, product
        with torch.no_grad():
            self.weight = nn.Parameter(basis.v @ linear.weight @ basis.u.T)
            self.bias = None if linear.bias is None else nn.Parameter(linear.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        u, v = self.basis.u, self.basis.v
        return _PaperFunction.apply(x, self.weight, self.bias, u, v, self.k, self.product)
