"""What every launcher needs: where its kernel is registered, how wide its offsets are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..ops._library import NAMESPACE

INTERPRETING: bool = knobs.runtime.interpret
DISPATCH_KEY = "CPU" if INTERPRETING else "CUDA"


def implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a launcher for the operator `name`, unless a compiled kernel serves it already."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [
        position
        for position, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def register(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launcher)
        def launch(*args: Any) -> Any:
            with nullcontext() if INTERPRETING else torch.cuda.device_of(args[0]):
                result = launcher(*args)
            # Kernels write behind autograd's back; it, and the layer, look at the version.
            tensors = [args[position] for position in written if args[position] is not None]
            torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
            return result

        qualified = f"{NAMESPACE}::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, DISPATCH_KEY):
            torch.library.impl(qualified, DISPATCH_KEY, launch)
        return launcher

    return register


def needs_int64(*tensors: Tensor) -> bool:
    """Whether an element of one of the matrices lies 2^31 or more elements from its first."""
    return any(
        sum((n - 1) * abs(stride) for n, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31
        for t in tensors
        if t.numel()
    )


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(device: torch.device) -> int:
    """How many programs fill the device: its multiprocessors."""
    if device.type != "cuda":
        return 4
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
