"""Lazy Adam on k entries: one launch, each entry's parameter and moments read and written once."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ._common import implement, needs_int64
from ._rounding import rounded_stochastically
from ._scalars import float64_bits, from_bits

_SCALARS = [
    "step",
    "step_size_bits",
    "decay1_bits",
    "decay2_bits",
    "beta1_bits",
    "beta2_bits",
    "eps_bits",
]


@triton.jit(do_not_specialize=_SCALARS)
def _adam(
    param_ptr,  # [m, n], as the moments
    exp_avg_ptr,  # or None: beta1 is 0
    exp_avg_sq_ptr,
    indices_ptr,  # [2, k]
    values_ptr,  # [k]
    step_ptr,  # one number, or None: then `step` holds it, and step_size_bits the step size
    lr_ptr,
    k,
    n_cols,
    param_stride0,
    param_stride1,
    exp_avg_stride0,
    exp_avg_stride1,
    exp_avg_sq_stride0,
    exp_avg_sq_stride1,
    indices_stride0,
    indices_stride1,
    values_stride,
    step,
    step_size_bits,
    decay1_bits,  # -log(beta1)
    decay2_bits,
    beta1_bits,
    beta2_bits,
    eps_bits,
    STEP_ON_DEVICE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
    p -= lr sqrt(1 - b2^step) / (1 - b1^step) m / (sqrt(v) + eps),   at the given entries.
    """
    # Shapes.
    dtype = param_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    index = tl.int64 if WIDE else tl.int32
    e = tl.program_id(0).to(index) * BLOCK + tl.arange(0, BLOCK)
    inside = e < k

    # Load.
    row = tl.load(indices_ptr + e * indices_stride1, mask=inside, other=0).to(index)  # [BLOCK]
    col = tl.load(indices_ptr + indices_stride0 + e * indices_stride1, mask=inside, other=0)
    col = col.to(index)
    g = tl.load(values_ptr + e * values_stride, mask=inside, other=0.0).to(wide)
    p_ptr = param_ptr + row * param_stride0 + col * param_stride1
    if exp_avg_ptr is not None:
        m_ptr = exp_avg_ptr + row * exp_avg_stride0 + col * exp_avg_stride1
        m_old = tl.load(m_ptr, mask=inside, other=0.0).to(wide)
    v_ptr = exp_avg_sq_ptr + row * exp_avg_sq_stride0 + col * exp_avg_sq_stride1
    p = tl.load(p_ptr, mask=inside, other=0.0).to(wide)
    old = tl.load(v_ptr, mask=inside, other=1.0)
    v = old.to(wide)

    # Compute: scalars in float64.
    if STEP_ON_DEVICE:
        number = tl.load(step_ptr)
        lr = tl.load(lr_ptr).to(tl.float64)
        # 1 - beta1^step
        correction1 = 1 - tl.exp(-number.to(tl.float64) * from_bits(decay1_bits))
        correction2 = 1 - tl.exp(-number.to(tl.float64) * from_bits(decay2_bits))
        step_size = (lr * tl.sqrt(correction2) / correction1).to(wide)
    else:
        number = step
        step_size = from_bits(step_size_bits).to(wide)
    m = g
    if exp_avg_ptr is not None:
        m = _lerp(m_old, g, (1 - from_bits(beta1_bits)).to(wide))
    v = _lerp(v, g * g, (1 - from_bits(beta2_bits)).to(wide))
    eps = from_bits(eps_bits).to(wide)
    if wide == tl.float64:
        p -= step_size * m / (tl.sqrt(v) + eps)
    else:
        # Rounded as PyTorch rounds; `sqrt` and `/` would be approximate.
        p -= tl.div_rn(step_size * m, tl.sqrt_rn(v) + eps)

    # Store.
    if exp_avg_ptr is not None:
        tl.store(m_ptr, m.to(dtype), mask=inside)
    if dtype == tl.bfloat16 or dtype == tl.float16:
        # As ops/sparse_adam_.py says.
        position = row.to(tl.int64) * n_cols + col
        v = rounded_stochastically(v, old, number.to(tl.int64), position)
    tl.store(v_ptr, v.to(dtype), mask=inside)
    tl.store(p_ptr, p.to(dtype), mask=inside)


@triton.jit
def _lerp(a, b, weight):
    """a + weight (b - a), from the nearer end, as torch.lerp."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


# Entries a program, and warps: each entry is three cache misses, so few entries a program and many
# programs. Not tuned at run time: the kernel updates in place.
BLOCK = 256
WARPS = 4


def _launch(
    param: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    step: int | Tensor,
    lr: Tensor | None,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    k = values.shape[0]
    if k == 0:
        return
    state = [param] if exp_avg is None else [param, exp_avg]
    step_on_device = isinstance(step, Tensor)
    decays = [-math.log(beta) if beta > 0 else math.inf for beta in (beta1, beta2)]
    _adam[(triton.cdiv(k, BLOCK),)](
        param,
        exp_avg,
        exp_avg_sq,
        indices,
        values,
        step if step_on_device else None,
        lr,
        k,
        param.shape[1],
        *param.stride(),
        *(exp_avg_sq if exp_avg is None else exp_avg).stride(),
        *exp_avg_sq.stride(),
        *indices.stride(),
        values.stride(0),
        0 if step_on_device else step,
        *(float64_bits(x) for x in (step_size, *decays, beta1, beta2, eps)),
        STEP_ON_DEVICE=step_on_device,
        WIDE=needs_int64(*state, exp_avg_sq, indices, values[None]) or k >= 2**31 - BLOCK,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@implement("sparse_adam_")
def sparse_adam_(
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
    state = (param, exp_avg, exp_avg_sq, indices, values)
    _launch(*state, step, None, step_size, beta1, beta2, eps)


@implement("_sparse_adam_tensor_step_")
def sparse_adam_tensor_step_(
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
    state = (param, exp_avg, exp_avg_sq, indices, values)
    _launch(*state, step, lr, 0.0, beta1, beta2, eps)


def _aot(dtype: str, step_on_device: bool, wide: bool, keeps_first: bool = True):
    signature = dict.fromkeys(_adam.arg_names, "i32") | dict.fromkeys(_SCALARS, "i64")
    for name in ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "values_ptr"):
        signature[name] = f"*{dtype}"
    signature |= {"indices_ptr": "*i64", "step_ptr": "*fp32", "lr_ptr": "*fp64"}
    constexprs: dict[str, int | None] = {
        "STEP_ON_DEVICE": step_on_device,
        "WIDE": wide,
        "BLOCK": BLOCK,
        **dict.fromkeys(("param_stride1", "indices_stride1", "values_stride"), 1),
        **({} if keeps_first else {"exp_avg_ptr": None}),
        **({} if step_on_device else {"step_ptr": None, "lr_ptr": None}),
    }
    signature |= dict.fromkeys(constexprs, "constexpr")
    return (_adam, signature, constexprs, {"num_warps": WARPS, "num_stages": 3})


AOT = [
    *(
        _aot(dtype, on_device, wide=False)
        for dtype in ("fp32", "fp64", "bf16", "fp16")
        for on_device in (False, True)
    ),
    _aot("bf16", True, wide=True),
    _aot("fp32", False, wide=False, keeps_first=False),
]
