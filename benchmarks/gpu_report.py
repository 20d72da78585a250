"""The machine, and the short table of a run. For gpu.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from gpu_steps import Outcome

_PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "tensorly", "hypothesis")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def machine(device: str) -> dict[str, Any]:
    """Card, driver, versions and commit: what a figure is worth nothing without."""
    found: dict[str, Any] = {
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "nvcc": output_of("nvcc", "--version").rpartition("\n")[2],
        "cuda of torch": torch.version.cuda,
        **versions(),
        "card": platform.processor() or platform.machine(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": getattr(properties, "L2_cache_size", None),
            "driver, clocks, power": output_of("nvidia-smi", query, "--format=csv,noheader"),
        }
    return found


def stem(found: dict[str, Any], date: str) -> str:
    card = re.sub(r"\W+", "-", found["card"].removeprefix("NVIDIA ")).strip("-").lower()
    return f"{card}-{date}-{found['commit']}"


def markdown(
    found: dict[str, Any], verdict: str, outcomes: list[Outcome], files: list[Path]
) -> str:
    versions = ", ".join(f"{k} {found[k]}" for k in ("torch", "triton", "cuda of torch", "nvcc"))
    lines = [f"# {found['card']}, commit {found['commit']}: {verdict}", "", versions, ""]
    lines += ["| step | outcome | seconds | |", "|---|---|---:|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:g} | {o.summary} |" for o in outcomes]
    for path in files:
        try:
            document = json.loads(path.read_text())
        except ValueError:  # of a benchmark that was ended as it wrote
            lines += ["", f"`{path.name}` is not whole."]
            continue
        lines += _operators(document) if "benchmarks" in document else _training(path, document)
    for o in outcomes:
        if o.tail:
            lines += ["", f"## {o.name}: {o.status}", "", "```", *o.tail, "```"]
    return "\n".join(lines) + "\n"


def _operators(document: dict[str, Any]) -> list[str]:
    """Our kernel in each case: against the bound, and the fastest that is not ours."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        if "contender" not in info:
            continue
        case = cases.setdefault((info["op"], info["case"], info["cache"]), {})
        case[info["contender"]] = {**info, "seconds": benchmark["stats"]["median"]}
    lines = [
        "",
        "| operator | case | L2 | backend | µs | host's µs | x bound | fastest peer | x ours |",
    ]
    lines += ["|---|---|---|---|---:|---:|---:|---|---:|"]
    for (op, name, cache), contenders in cases.items():
        ours = contenders.pop("ours", None)
        contenders.pop("bound", None)
        if ours is None:
            continue
        peer = min(contenders, key=lambda c: contenders[c]["seconds"], default="")
        times = f"{contenders[peer]['seconds'] / ours['seconds']:.2f}" if peer else ""
        host = ours.get("host_seconds")
        cells = (op, name, cache, ours["backend"], f"{ours['seconds'] * 1e6:.1f}")
        cells += (f"{host * 1e6:.0f}" if host else "",)
        lines.append(f"| {' | '.join(cells)} | {ours['times_bound']:.2f} | {peer} | {times} |")
    return lines


def _training(path: Path, document: dict[str, Any]) -> list[str]:
    """The rows as they are, less what is empty or nested."""
    rows = document.get("rows", [])
    names = [n for n in (rows[0] if rows else {}) if not isinstance(rows[0][n], (dict, list))]
    lines = ["", f"`{path.name}`", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = (f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names)
        lines.append(f"| {' | '.join(cells)} |")
    return lines
