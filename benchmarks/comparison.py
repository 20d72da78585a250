"""Contenders in one case of one operator: checked, then timed in turn, then played back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import SPIN_CYCLES, Roofs, Run, Stopwatch, host_seconds, take_turns
from shapes import Case

_ROUNDS = (3, 50)
# What a peer raises where it does not serve a dtype or a device.
_UNSERVED = (RuntimeError, NotImplementedError, TypeError)


@dataclass
class Comparison:
    """One case of one operator: what runs, what it must return, what it cannot do without.

    `bound` among the runs is the least that has to be done, done by torch.
    """

    runs: dict[str, Run]
    check: Callable[[str, Any], None]  #: of a contender's name and result; AssertionError
    n_bytes: int  #: that have to be read or written
    flops: int = 0
    unserved: dict[str, str] = field(default_factory=dict)  #: contender -> why

    def prepare(self) -> None:
        """Each contender runs once and is checked, before anything is timed."""
        for name, run in list(self.runs.items()):
            try:
                self.check(name, run())
            except (*_UNSERVED, AssertionError) as error:
                if name in ("ours", "reference"):
                    raise
                # A peer that cannot, or that is wrong, is no peer.
                self.unserved[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                del self.runs[name]


Compare = Callable[[Case, torch.device, torch.Generator], Comparison]


def serving_backend(op: str, device: torch.device) -> str:
    """Which backend's kernel the dispatcher takes for the operator on the device."""
    table = torch._C._dispatch_dump(f"sparsegrad_kernels::{op}")
    found = re.search(rf"^{device.type.upper()}: registered at (\S+)", table, re.MULTILINE)
    if found is None:
        return "reference"
    source = found[1].partition(":")[0]
    return {".cpp": "cpp", ".cu": "cuda"}.get(Path(source).suffix, "triton")


class Playback:
    """A clock that is moved on by seconds measured before."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def play(self, seconds: list[float]) -> Run:
        remaining = iter(seconds)

        def advance() -> None:
            self._now += next(remaining)

        return advance


class Session:
    """Of the session: the device, its roofs, and what was measured last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.roofs: Roofs | None = None
        self.case: tuple[Any, ...] = ()
        self.comparison: Comparison | None = None
        self.times: dict[str, dict[str, list[float]]] = {}  # cache -> contender -> seconds
        self.host_seconds: float | None = None  # of launching ours, on a GPU

    def measured(
        self, key: tuple[Any, ...], case: Case, compare: Compare, cache: str, budget: float
    ) -> tuple[Comparison, dict[str, list[float]]]:
        if self.case != key:
            self.case, self.comparison, self.times = (), None, {}  # frees the last one's tensors
            generator = torch.Generator()
            print(f"seed {generator.seed()}")
            comparison = compare(case, self.device, generator)
            comparison.prepare()
            self.case, self.comparison = key, comparison
            if self.device.type == "cuda":
                self.host_seconds = host_seconds(comparison.runs["ours"], 2 * SPIN_CYCLES)
        assert self.comparison is not None
        if cache not in self.times:
            stopwatch = Stopwatch(self.device, cold=cache == "cold")
            once = take_turns(self.comparison.runs, 1, stopwatch)
            turn = sum(seconds[0] for seconds in once.values())
            repeats = min(max(int(budget / turn), _ROUNDS[0]), _ROUNDS[1])
            self.times[cache] = take_turns(self.comparison.runs, repeats, stopwatch)
        return self.comparison, self.times[cache]
