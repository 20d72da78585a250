"""Input checks: every error names the argument and says what was got."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


def check_matrix(name: str, value: Tensor) -> None:
    """A dense matrix of one of the four floating dtypes."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} ({what}), got {tuple(value.shape)}")


def check_tol(tol: float) -> None:
    if not isinstance(tol, (int, float)):
        raise TypeError(f"tol must be a number, got {type(tol).__name__}")
    if not tol >= 0 or math.isinf(tol):
        raise ValueError(f"tol must be finite and not negative, got {tol}")


def check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def check_coo(indices: Tensor, values: Tensor, like_name: str, like: Tensor) -> None:
    """`indices [2, n]` int64 and `values [n]`, addressing entries of the matrix `like`."""
    check_tensor("indices", indices)
    check_tensor("values", values)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if values.dim() != 1:
        raise ValueError(f"values must have 1 dimension, got shape {tuple(values.shape)}")
    check_shape("indices", indices, (2, values.shape[0]), "[2, n] with n = len(values)")
    check_like("values", values, like_name, like)
    if indices.device != values.device:
        raise ValueError(
            f"indices must be on the device of values, {values.device}, got {indices.device}"
        )


def check_bounds(indices: Tensor, shape: tuple[int, int]) -> None:
    """Index bounds, where looking at them costs no synchronisation (CPU, not while tracing)."""
    if indices.device.type != "cpu" or indices.shape[1] == 0 or torch.compiler.is_compiling():
        return
    low, high = indices.amin(1).tolist(), indices.amax(1).tolist()
    if min(low) < 0 or high[0] >= shape[0] or high[1] >= shape[1]:
        raise ValueError(
            f"indices must lie in [0, {shape[0]}) x [0, {shape[1]}), "
            f"got rows {low[0]}..{high[0]}, columns {low[1]}..{high[1]}"
        )
