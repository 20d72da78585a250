"""`pytest benchmarks/`: every operator against its peers, with pytest-benchmark.

pytest-benchmark times one test after another, and a machine that slows down in between makes the
later one look worse. So the first test of a group times all its contenders in turn, and each test
then plays back its own seconds to pytest-benchmark, whose timer is the clock that this playing
moves on. The same serves CUDA, where seconds come from events and not from the host's clock.

    pytest benchmarks/                            quick: under 3 minutes on 2 cores
    pytest benchmarks/ --full --device cuda --benchmark-json=results.json
    SPARSEGRAD_BACKEND=triton pytest benchmarks/  another backend: they are chosen on import
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import Roofs, Run, Stopwatch, provenance, take_turns
from shapes import Case, cases

sys.path.append(str(Path(__file__).parents[1] / "python_tests"))

collect_ignore = ["bench_training.py"]  # a command of its own
_SECONDS = {"quick": 0.5, "full": 1.5}  # of timing per group
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


@dataclass(frozen=True)
class Lane:
    """One contender in one case, with a warm or a cold L2."""

    case: Case
    cache: str
    contender: str


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsegrad_kernels")
    group.addoption("--full", action="store_true", help="all shapes, dtypes, fractions, densities")
    group.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contenders(*names, varies): who takes part, on what cases")
    config.stash[_STATE] = _State(torch.device(config.getoption("--device")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("contenders")
    if marker is None:
        return
    device = metafunc.config.stash[_STATE].device
    backend = serving_backend(metafunc.function.__name__.removeprefix("test_"), device)
    names = [n for n in ("ours", "reference", *marker.args) if (n, backend) != _TWICE]
    on_gpu = device.type == "cuda"
    lanes = [
        pytest.param(
            Lane(case, cache, name),
            id=f"{case}-{cache}-{backend if name == 'ours' else name}",
            marks=pytest.mark.benchmark(timer=PLAYBACK.now),
        )
        for case in cases(metafunc.config.getoption("--full"), on_gpu, marker.kwargs["varies"])
        for cache in (("warm", "cold") if on_gpu else ("warm",))
        for name in names
    ]
    metafunc.parametrize("lane", lanes)


_TWICE = ("reference", "reference")  # where it is what serves, it is "ours" already


def serving_backend(op: str, device: torch.device) -> str:
    """Which backend's kernel the dispatcher takes for the operator on the device."""
    table = torch._C._dispatch_dump(f"sparsegrad_kernels::{op}")
    found = re.search(rf"^{device.type.upper()}: registered at (\S+)", table, re.MULTILINE)
    if found is None:
        return "reference"
    source = found[1].partition(":")[0]
    return {".cpp": "cpp", ".cu": "cuda"}.get(Path(source).suffix, "triton")


class _Playback:
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


PLAYBACK = _Playback()


class _State:
    """Of the session: the device, its roofs, and what was measured last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.roofs: Roofs | None = None
        self.case: tuple[Any, ...] = ()
        self.comparison: Comparison | None = None
        self.times: dict[str, dict[str, list[float]]] = {}  # cache -> contender -> seconds

    def measured(
        self, key: tuple[Any, ...], case: Case, compare: Compare, cache: str, budget: float
    ) -> tuple[Comparison, dict[str, list[float]]]:
        if self.case != key:
            self.comparison, self.times = None, {}  # frees the last case's tensors first
            generator = torch.Generator()
            print(f"seed {generator.seed()}")
            comparison = compare(case, self.device, generator)
            comparison.prepare()
            self.case, self.comparison = key, comparison
        assert self.comparison is not None
        if cache not in self.times:
            stopwatch = Stopwatch(self.device, cold=cache == "cold")
            once = take_turns(self.comparison.runs, 1, stopwatch)
            turn = sum(seconds[0] for seconds in once.values())
            repeats = min(max(int(budget / turn), _ROUNDS[0]), _ROUNDS[1])
            self.times[cache] = take_turns(self.comparison.runs, repeats, stopwatch)
        return self.comparison, self.times[cache]


_STATE = pytest.StashKey[_State]()


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark, lane: Lane) -> Callable[[Compare], None]:
    """`race(compare)`: checks and times all contenders once, and reports this test's."""
    config, op = request.config, request.function.__name__.removeprefix("test_")
    state, case, device = config.stash[_STATE], lane.case, config.stash[_STATE].device
    if state.roofs is None:
        state.roofs = Roofs(device)

    def run(compare: Compare) -> None:
        budget = _SECONDS["full" if config.getoption("--full") else "quick"]
        comparison, times = state.measured((op, case), case, compare, lane.cache, budget)
        if lane.contender in comparison.unserved:
            pytest.skip(comparison.unserved[lane.contender])
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        roof = state.roofs.seconds(comparison.n_bytes, comparison.flops, case.dtype)
        mine, bound = medians[lane.contender], medians.get("bound", roof)
        benchmark.group = f"{op} {case} {lane.cache}"
        benchmark.extra_info.update(
            op=op,
            case=str(case),
            shape=asdict(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            fraction=case.fraction,
            density=case.density,
            cache=lane.cache,
            device=str(device),
            contender=lane.contender,
            backend=serving_backend(op, device) if lane.contender == "ours" else None,
            bytes=comparison.n_bytes,
            flops=comparison.flops,
            bound_seconds=bound,
            roof_seconds=roof,
            times_bound=mine / bound,
            times_ours=mine / medians["ours"],
        )
        seconds = times[lane.contender]
        benchmark.pedantic(PLAYBACK.play(seconds), rounds=len(seconds))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    state = config.stash[_STATE]
    machine_info["sparsegrad"] = provenance(state.device)
    if state.roofs is not None:
        machine_info["roofs"] = state.roofs.as_dict()
