"""Commands with a time limit, their logs, and what became of them. For gpu.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

_GRACE = 20  # seconds between asking a process to end and ending it: pytest writes what it has
_TAIL = 40  # lines of a log that are kept with a failure


@dataclass(frozen=True)
class Step:
    """A command. Steps of one stage run side by side."""

    name: str
    command: Sequence[str]
    seconds: float  #: it may take
    environment: dict[str, str] = field(default_factory=dict)
    needs: Sequence[str | Path] = ()  #: files; without one the step is "absent"
    ends_run: Sequence[str] = ()  #: outcomes after which no other step is worth its time


@dataclass
class Outcome:
    name: str
    command: str
    status: str  #: passed, failed, timed out, absent, or not run
    seconds: float = 0.0
    summary: str = ""
    log: str = ""
    tail: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.status == "passed"


def run_stage(steps: Sequence[Step], logs: Path, deadline: float, workers: int) -> list[Outcome]:
    with ThreadPoolExecutor(max(1, min(workers, len(steps)))) as pool:
        return list(pool.map(lambda step: run_step(step, logs, deadline), steps))


def run_step(step: Step, logs: Path, deadline: float) -> Outcome:
    """Run to its end, its own limit or the deadline (of time.monotonic)."""
    outcome = Outcome(step.name, " ".join(map(str, step.command)), "not run")
    missing = [str(path) for path in step.needs if not Path(path).exists()]
    if missing:
        outcome.status, outcome.summary = "absent", f"{', '.join(missing)} is not there"
        return outcome
    limit = min(step.seconds, deadline - time.monotonic())
    if limit < 5:
        outcome.summary = "no time was left"
        return outcome
    log = logs / (re.sub(r"\W+", "-", step.name) + ".log")
    print(f"   {step.name} ...", flush=True)
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            step.command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **step.environment},
            start_new_session=True,
        )
        timed_out = not _wait(process, limit)
    lines = log.read_text(errors="replace").splitlines()
    outcome.seconds, outcome.log = round(time.monotonic() - start, 1), str(log)
    outcome.summary = _summary(lines)
    outcome.status = "timed out" if timed_out else "failed" if process.returncode else "passed"
    if not outcome.good:
        outcome.tail = lines[-_TAIL:]
    print(f"   {step.name}: {outcome.status}, {outcome.seconds} s  {outcome.summary}", flush=True)
    return outcome


def _wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether the process, which leads a group of its own, ended by itself."""
    for number in (None, signal.SIGINT, signal.SIGKILL):
        if number is not None:
            os.killpg(process.pid, number)
        try:
            process.wait(limit if number is None else _GRACE)
        except subprocess.TimeoutExpired:
            continue
        return number is None
    return False


def _summary(lines: list[str]) -> str:
    """pytest's or compute-sanitizer's last word."""
    wanted = re.compile(r"\d+ (passed|failed|skipped|error)|ERROR SUMMARY|RACECHECK SUMMARY")
    said = [line.strip("= ") for line in lines if wanted.search(line)]
    return "; ".join(said[-2:])
