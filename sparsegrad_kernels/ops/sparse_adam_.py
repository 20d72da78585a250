"""One lazy Adam step on k entries: moments and parameter elsewhere are left as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_coo, check_like, check_matrix, check_shape
from ._library import call_in_bounds, define


def _reference(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    wide = torch.promote_types(param.dtype, torch.float32)
    entries = (indices[0], indices[1])
    grad = values.to(wide)
    first = exp_avg[entries].to(wide).lerp(grad, 1 - beta1)
    second = exp_avg_sq[entries].to(wide).lerp(grad.square(), 1 - beta2)
    exp_avg[entries] = first.to(exp_avg.dtype)
    exp_avg_sq[entries] = second.to(exp_avg_sq.dtype)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    update = step_size * first / (second.sqrt() + eps)
    param[entries] = (param[entries].to(wide) - update).to(param.dtype)


def _fake(*args) -> None:
    return None


_op = define(
    "sparse_adam_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor indices, "
    "Tensor values, int step, float lr, float beta1, float beta2, float eps) -> ()",
    _reference,
    _fake,
)


def sparse_adam_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """`torch.optim.SparseAdam`'s update, in place, on the given entries only (paper section 5.1).

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `p -= lr sqrt(1 - b2^step) / (1 - b1^step) m / (sqrt(v) + eps)`.

    Args:
        param: matrix `[m, n]`, updated in place.
        exp_avg, exp_avg_sq: its moments, same shape and device, floating, updated in place.
        indices: `[2, k]` int64, no entry twice (as `topk_coo` returns, or `coalesce()`).
        values: the gradient `[k]`, dtype and device of `param`.
        step: number of this step, from 1.
        lr, beta1, beta2, eps: Adam's.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device, indices out of bounds (checked
            on the CPU), or a hyperparameter outside its range.
    """
    check_matrix("param", param)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_matrix(name, moment)
        check_shape(name, moment, tuple(param.shape), "that of param")
        check_like(name, moment, "param", param)
    check_coo(indices, values, "param", param)
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    shape = (param.shape[0], param.shape[1])
    args = (param, exp_avg, exp_avg_sq, indices, values, step, lr, beta1, beta2, eps)
    call_in_bounds("sparse_adam_", _op, indices, shape, *args)
