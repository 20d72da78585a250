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

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from comparison import Compare, Playback, Session, serving_backend
from measure import Roofs, provenance
from shapes import Case, cases

sys.path.append(str(Path(__file__).parents[1] / "python_tests"))

collect_ignore = ["bench_training.py"]  # a command of its own
_SECONDS = {"quick": 0.5, "full": 1.5}  # of timing per group
_TWICE = ("reference", "reference")  # where it is what serves, it is "ours" already
_PLAYBACK = Playback()
_SESSION = pytest.StashKey[Session]()


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
    config.addinivalue_line(
        "markers",
        "contenders(*names, varies, op): who takes part, on what cases, in which operator",
    )
    config.stash[_SESSION] = Session(torch.device(config.getoption("--device")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("contenders")
    if marker is None:
        return
    device = metafunc.config.stash[_SESSION].device
    backend = serving_backend(_operator(metafunc.function.__name__, marker), device)
    names = [n for n in ("ours", "reference", *marker.args) if (n, backend) != _TWICE]
    on_gpu = device.type == "cuda"
    lanes = [
        pytest.param(
            Lane(case, cache, name),
            id=f"{case}-{cache}-{backend if name == 'ours' else name}",
            marks=pytest.mark.benchmark(timer=_PLAYBACK.now),
        )
        for case in cases(metafunc.config.getoption("--full"), on_gpu, marker.kwargs["varies"])
        for cache in (("warm", "cold") if on_gpu else ("warm",))
        for name in names
    ]
    metafunc.parametrize("lane", lanes)


def _operator(test: str, marker: pytest.Mark) -> str:
    """The test's name has it, unless the marker says another."""
    return marker.kwargs.get("op", test.removeprefix("test_"))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark, lane: Lane) -> Callable[[Compare], None]:
    """`race(compare)`: checks and times all contenders once, and reports this test's."""
    config, name = request.config, request.function.__name__.removeprefix("test_")
    marker = request.node.get_closest_marker("contenders")
    op = _operator(name, marker)
    session, case = config.stash[_SESSION], lane.case
    device = session.device
    if session.roofs is None:
        session.roofs = Roofs(device)

    def run(compare: Compare) -> None:
        budget = _SECONDS["full" if config.getoption("--full") else "quick"]
        comparison, times = session.measured((name, case), case, compare, lane.cache, budget)
        if lane.contender in comparison.unserved:
            pytest.skip(comparison.unserved[lane.contender])
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        roof = session.roofs.seconds(comparison.n_bytes, comparison.flops, case.dtype)
        mine, bound = medians[lane.contender], medians.get("bound", roof)
        benchmark.group = f"{name} {case} {lane.cache}"
        benchmark.extra_info.update(
            op=name,
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
            host_seconds=session.host_seconds if lane.contender == "ours" else None,
        )
        seconds = times[lane.contender]
        benchmark.pedantic(_PLAYBACK.play(seconds), rounds=len(seconds))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    session = config.stash[_SESSION]
    del machine_info["node"]  # the machine's name
    machine_info["sparsegrad"] = provenance(session.device)
    if session.roofs is not None:
        machine_info["roofs"] = session.roofs.as_dict()
