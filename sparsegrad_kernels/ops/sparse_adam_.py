"""One lazy Adam step on k entries: moments and parameter elsewhere are left as they are.

A step changes the second moment by `1 - beta2` of itself, about a thousandth, which in 16 bits
rounding to nearest would drop: after some hundred steps of an entry it would no longer follow, nor
ever decay. So there it is rounded stochastically, its random bits those of the step and the entry.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, check_coo, check_like, check_matrix, check_shape, check_tensor
from ._library import call_in_bounds, define
from ._rounding import round_stochastically


def _update(
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: int | Tensor,
    step_size: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    wide = torch.promote_types(param.dtype, torch.float32)
    entries = (indices[0], indices[1])
    grad = values.to(wide)
    first = grad if exp_avg is None else exp_avg[entries].to(wide).lerp(grad, 1 - beta1)
    second = exp_avg_sq[entries].to(wide).lerp(grad.square(), 1 - beta2)
    update = step_size * first / (second.sqrt() + eps)
    # First what autograd may refuse: then nothing has been written.
    param[entries] = (param[entries].to(wide) - update).to(param.dtype)
    if exp_avg is not None:
        exp_avg[entries] = first.to(exp_avg.dtype)
    if exp_avg_sq.dtype in (torch.bfloat16, torch.float16):
        if not isinstance(step, Tensor):
            step = torch.full((1,), step, device=param.device)
        seed = step.reshape(1).to(torch.int64)
        position = indices[0] * param.shape[1] + indices[1]
        second = round_stochastically(second, exp_avg_sq[entries], seed, position)
    exp_avg_sq[entries] = second.to(exp_avg_sq.dtype)


def _reference(
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    _update(param, exp_avg, exp_avg_sq, indices, values, step, step_size, beta1, beta2, eps)


def _reference_tensor_step(
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    # 1 - beta^step in float64: float32 would lose its digits where beta^step is near 1.
    corrections = [
        -torch.expm1(step.double() * (math.log(beta) if beta > 0 else -math.inf))
        for beta in (beta1, beta2)
    ]
    step_size = (lr.double() * corrections[1].sqrt() / corrections[0]).reshape(())
    _update(param, exp_avg, exp_avg_sq, indices, values, step, step_size, beta1, beta2, eps)


def _fake(*args) -> None:
    return None


_op = define(
    "sparse_adam_(Tensor(a!) param, Tensor(b!)? exp_avg, Tensor(c!) exp_avg_sq, Tensor indices, "
    "Tensor values, int step, float lr, float beta1, float beta2, float eps) -> ()",
    _reference,
    _fake,
)

_op_tensor_step = define(
    "_sparse_adam_tensor_step_(Tensor(a!) param, Tensor(b!)? exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor indices, Tensor values, Tensor step, Tensor lr, float beta1, float beta2, float eps)"
    " -> ()",
    _reference_tensor_step,
    _fake,
)


def update_(
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    *rest: Any,
) -> None:
    """`sparse_adam_` of arguments that are known to be right: the checks take as long as the step.

    `step` and `lr`, which come next, are both numbers or both tensors.
    """
    op = _op_tensor_step if isinstance(rest[0], Tensor) else _op
    op(param, exp_avg, exp_avg_sq, indices, values, *rest)


def _check_scalar(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """A number on the device of `param`. Its value is not looked at: that would synchronise."""
    check_tensor(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must hold one number, got shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name} must have one of the dtypes {', '.join(map(str, dtypes))}, got {value.dtype}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of param, {like.device}, got {value.device}"
        )


def sparse_adam_(
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """`torch.optim.SparseAdam`'s update, in place, on the given entries only (paper section 5.1).

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `p -= lr sqrt(1 - b2^step) / (1 - b1^step) m / (sqrt(v) + eps)`.

    In bfloat16 and float16 `v` is rounded stochastically, by the same bits for the same step.

    With `step` or `lr` as a tensor the launch can be captured in a CUDA graph, and each replay
    reads what they then hold: nothing waits for the device, and their values are not checked.

    Args:
        param: matrix `[m, n]`, updated in place.
        exp_avg, exp_avg_sq: its moments, same shape, dtype and device, updated in place; `exp_avg`
            may be None where `beta1` is 0, for it would be the gradient.
        indices: `[2, k]` int64, no entry twice (as `topk_coo` returns, or `coalesce()`).
        values: the gradient `[k]`, dtype and device of `param`.
        step: number of this step, from 1: an int, or a tensor of one number, float32, int32 or
            int64, on the device of `param`.
        lr: learning rate: a float, or a floating tensor of one number on the device of `param`.
        beta1, beta2, eps: Adam's.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device, indices out of bounds (checked
            on the CPU), or a hyperparameter outside its range.
    """
    check_matrix("param", param)
    moments = {"exp_avg_sq": exp_avg_sq}
    if exp_avg is not None or beta1 != 0:
        moments["exp_avg"] = cast(Tensor, exp_avg)
    for name, moment in moments.items():
        check_matrix(name, moment)
        check_shape(name, moment, tuple(param.shape), "that of param")
        check_like(name, moment, "param", param)
    check_coo(indices, values, "param", param)
    if isinstance(step, Tensor):
        _check_scalar("step", step, (torch.float32, torch.int32, torch.int64), param)
    elif step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if isinstance(lr, Tensor):
        _check_scalar("lr", lr, FLOAT_DTYPES, param)
    elif not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    shape = (param.shape[0], param.shape[1])
    state = (param, exp_avg, exp_avg_sq, indices, values)
    if isinstance(step, Tensor) or isinstance(lr, Tensor):
        # Made on the device, so that this too can be captured.
        if not isinstance(step, Tensor):
            step = torch.full((), step, dtype=torch.int64, device=param.device)
        if not isinstance(lr, Tensor):
            lr = torch.full((), lr, dtype=torch.float64, device=param.device)
        args = (*state, step, lr, beta1, beta2, eps)
        call_in_bounds("_sparse_adam_tensor_step_", _op_tensor_step, indices, shape, *args)
        return
    call_in_bounds("sparse_adam_", _op, indices, shape, *state, step, lr, beta1, beta2, eps)
