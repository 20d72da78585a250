"""How an operator of this package is defined and called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._checks import check_bounds

NAMESPACE = "sparsegrad_kernels"

# Types of device whose kernels never make the host wait; filled as backends are loaded.
SYNC_FREE_DEVICES: set[str] = set()


def is_sync_free(tensor: Tensor) -> bool:
    """Whether kernels serve this tensor that leave counts on the device."""
    return tensor.device.type in SYNC_FREE_DEVICES


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done to this tensor is recorded as a CUDA graph, to be done in replays."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _is_registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def has_kernel(name: str, tensor: Tensor) -> bool:
    """Whether anything but the reference serves operator `name` for this tensor."""
    return _is_registered(name, tensor.device.type.upper())


def allows_tf32() -> bool:
    """Whether the user lets torch multiply float32 matrices as tf32: what all kernels follow."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def multiplying_as_tf32(wanted: bool) -> contextlib.AbstractContextManager[None]:
    """If `wanted`, let torch and the kernels multiply float32 matrices as tf32 meanwhile."""
    return _with_tf32() if wanted and not allows_tf32() else contextlib.nullcontext()


@contextlib.contextmanager
def _with_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# For the compiled kernels, to which torch's stable ABI does not give the flag.
torch.library.define(f"{NAMESPACE}::_allow_tf32", "() -> bool")
torch.library.impl(f"{NAMESPACE}::_allow_tf32", "CompositeExplicitAutograd", allows_tf32)


def without_autocast(device_type: str, f: Callable[..., Any], *args: Any) -> Any:
    """`f(*args)`, whose operators compute in their arguments' dtype.

    `torch.autocast` takes ten times as long to enter, which every operator of every step would pay.
    """
    if not torch.is_autocast_enabled(device_type):
        return f(*args)
    if torch.compiler.is_compiling():
        with torch.autocast(device_type, enabled=False):
            return f(*args)
    torch.set_autocast_enabled(device_type, False)
    try:
        return f(*args)
    finally:
        torch.set_autocast_enabled(device_type, True)


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `sparsegrad_kernels::<schema>` and return the callable overload.

    The reference serves every device (CompositeExplicitAutograd); a compiled or Triton kernel
    overrides it by registering itself for its own device's dispatch key.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(qualified, fake)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(tensor: Tensor, *args: Any) -> Any:
        return without_autocast(tensor.device.type, overload, tensor, *args)

    return call


def call_in_bounds(
    name: str,
    call: Callable[..., Any],
    indices: Tensor,
    shape: tuple[int, int],
    *args: Any,
) -> None:
    """`call(*args)` where `indices` lie in `shape`, else a ValueError before anything is written.

    The compiled CPU kernels look for themselves, so that the indices are read once.
    """
    if torch.compiler.is_compiling() or not _is_compiled(name):
        check_bounds(indices, shape)
        call(*args)
        return
    try:
        call(*args)
    except RuntimeError:
        check_bounds(indices, shape)
        raise


def _is_compiled(name: str) -> bool:
    # Not at the top: the kernels are loaded there, and need this module.
    from .._backends import backends

    # Triton's interpreter serves the CPU too, and does not look at the indices.
    return backends()["cpp"].loaded and _is_registered(name, "CPU")
