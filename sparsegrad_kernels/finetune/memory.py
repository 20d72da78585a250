"""Peak memory of a training step: what PyTorch's allocators handed out, measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

# On the CPU a step is watched by the profiler, which slows it: a few steps, after the first, which
# makes the optimizer's state.
WATCHED_STEPS = (1, 2, 3)


class PeakMemory:
    """Peak over the training loop; on the CPU over `WATCHED_STEPS`.

    On CUDA it is the allocator's `max_memory_allocated`. The CPU allocator keeps no such count: the
    profiler's record of every allocation and release gives the rise within a step, and the live
    tensors before it the base.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def peak_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._peak or None

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        if self.device.type != "cpu" or step not in WATCHED_STEPS:
            yield
            return
        base = live_tensor_bytes()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield
        self._peak = max(self._peak, base + _highest_rise(record))


def live_tensor_bytes() -> int:
    """Bytes of all CPU storages that live tensors of this process hold, each once."""
    import gc

    storages = {}
    for item in gc.get_objects():
        # By its type: isinstance would ask lazy modules and proxies for a __class__.
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            for tensor in (
                (item._indices(), item._values()) if item.layout is torch.sparse_coo else (item,)
            ):
                storage = tensor.untyped_storage()
                # Those that torch.compile left behind have a size, but no memory.
                with contextlib.suppress(RuntimeError):
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _highest_rise(record: profile) -> int:
    live = highest = 0
    results = getattr(record.profiler, "kineto_results", None)
    assert results is not None, "the profiler has not run"
    for event in results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest
