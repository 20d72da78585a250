"""How a run is timed: contenders take turns, figures are medians.

On CUDA the time is that between two events around the run, which include the host's launches only
where the device would wait for them: a short spin before the first event lets the host run ahead.
Cold runs find an L2 cache full of something else, warm ones what the run before left in it.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsegrad_kernels import __version__, backends
from sparsegrad_kernels.__main__ import environment

Run = Callable[[], object]
SPIN_CYCLES = 1_000_000  # about half a millisecond


class Stopwatch:
    """Seconds of single runs on a device."""

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device = device
        self.evicting = None
        if cold:
            cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.evicting = torch.empty(4 * cache_bytes, dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        if self.evicting is not None:
            self.evicting.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def take_turns(runs: dict[str, Run], repeats: int, stopwatch: Stopwatch) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, without the first turn, which warms up.

    Every turn runs all of them, so that they share whatever else the machine does.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = stopwatch(run)
            if turn:
                times[name].append(seconds)
    return times


def medians(
    runs: dict[str, Run], repeats: int, device: torch.device | None = None
) -> dict[str, float]:
    times = take_turns(runs, repeats, Stopwatch(device or torch.device("cpu")))
    return {name: statistics.median(each) for name, each in times.items()}


def host_seconds(run: Run, cycles: int = 10_000_000) -> float:
    """What launching takes Python, PyTorch and the driver.

    The device is kept busy for so many cycles meanwhile: a run that waits for it has them included.
    """
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def captured(run: Run) -> Run:
    """The replay of a graph of `run`, which makes all its tensors in the graph's own memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is compiled, tuned and allocated at first
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def read_once(a: Tensor) -> Tensor:
    """The cheapest that reads all of a contiguous tensor: the largest of its 32-bit words."""
    flat = a.reshape(-1)
    return flat[: flat.shape[0] // 2 * 2].view(torch.int32).amax()


class Roofs:
    """What the device does at best, measured: reading memory, and torch's dense product."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes_per_second = self._read_rate()
        self.flops_per_second: dict[str, float] = {}  # by dtype, measured when first asked for

    def seconds(self, n_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """The least that moving these bytes, or these operations, can take."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops_per_second:
            self.flops_per_second[name] = self._product_rate(dtype)
        return max(n_bytes / self.bytes_per_second, flops / self.flops_per_second[name])

    def _best(self, run: Run) -> float:
        return min(take_turns({"": run}, 9, Stopwatch(self.device))[""])

    def _read_rate(self) -> float:
        n_bytes = 2**30 if self.device.type == "cuda" else 2**27
        memory = torch.ones(n_bytes // 4, device=self.device)
        return n_bytes / self._best(lambda: read_once(memory))

    def _product_rate(self, dtype: torch.dtype) -> float:
        size = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        layouts = (lambda: a @ b, lambda: a.T @ b, lambda: a @ b.T)
        return 2 * size**3 / min(map(self._best, layouts))

    def as_dict(self) -> dict[str, object]:
        return {
            "bytes_per_second": self.bytes_per_second,
            "flops_per_second": self.flops_per_second,
        }


def provenance(device: torch.device) -> dict[str, object]:
    """Hardware, versions, kernels, commit and date: what a figure is worth nothing without."""
    found: dict[str, object] = {
        "sparsegrad_kernels": __version__,
        "commit": _output_of("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": str(device),
        **environment(),
        # Without the place of a library that was loaded: results are shown to others.
        "backends": {
            name: backend.details if backend.loaded else backend.reason
            for name, backend in backends().items()
        },
    }
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
        query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
        found["driver, clock, power"] = _output_of("nvidia-smi", query, "--format=csv,noheader")
    return found


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
