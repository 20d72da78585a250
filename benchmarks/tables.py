"""The report's tables, as HTML, from the documents that the benchmarks wrote."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import paper_results

REFERENCE = "regular FT"
Rows = Iterable[dict[str, Any]]


def render(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A cell that starts with a digit, or is a dash, is a number and stands on the right."""
    body = list(body)
    lines = "".join(
        f"<tr>{''.join(_cell('td', text, _is_number(text)) for text in row)}</tr>" for row in body
    )
    titles = "".join(
        _cell("th", title, bool(body) and all(_is_number(row[column]) for row in body))
        for column, title in enumerate(head)
    )
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>'


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit()


def _cell(tag: str, text: str, is_number: bool) -> str:
    return f"<{tag}{' class=n' if is_number else ''}>{html.escape(text)}</{tag}>"


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def duration(seconds: float) -> str:
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def average_over_tasks(rows: Rows) -> list[dict[str, Any]]:
    """By model and method, as the paper averages: over the tasks, where all were measured."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), []).append(row)
    found = []
    for (model, method), members in groups.items():
        averages: dict[str, Any] = {"model": model, "method": method, "status": "measured"}
        failed = [member["status"] for member in members if member["status"] != "measured"]
        if failed:
            averages["status"] = failed[0]
        for name in ("steps_per_second", "peak_bytes"):
            values = [member[name] for member in members]
            averages[name] = None if failed or None in values else statistics.mean(values)
        found.append(averages)
    return found


def with_ratios(rows: Rows) -> list[dict[str, Any]]:
    """Adds each row's ratio to regular fine-tuning of the same model and task."""
    rows = list(rows)
    base = {(r["model"], r.get("task")): r for r in rows if r["method"] == REFERENCE}
    for row in rows:
        against = base.get((row["model"], row.get("task")), {})
        for name in ("steps_per_second", "peak_bytes"):
            mine, other = row[name], against.get(name)
            row[f"{name}_ratio"] = mine / other if mine is not None and other else None
    return rows


def averages_table(rows: Rows) -> str:
    """The paper's Table 3, with ours beside it."""
    body = []
    for row in with_ratios(average_over_tasks(rows)):
        speed = memory = None
        if row["model"] == paper_results.MODEL:
            speed = paper_results.paper_ratio(paper_results.STEPS_PER_SECOND, row["method"])
            memory = paper_results.paper_ratio(paper_results.PEAK_MB["AVG"], row["method"])
        measured = row["status"] == "measured"
        peak = row["peak_bytes"]
        body.append(
            (
                row["model"],
                row["method"],
                number(row["steps_per_second"]) if measured else row["status"],
                number(row["steps_per_second_ratio"], unit="x"),
                number(speed, unit="x"),
                number(None if peak is None else peak / 2**20, ",.0f"),
                number(row["peak_bytes_ratio"], unit="x"),
                number(memory, unit="x"),
            )
        )
    head = ("model", "method", "steps/s", "to regular", "paper", "peak MiB", "to regular")
    return render((*head, "paper"), body)


def tasks_table(rows: Rows) -> str:
    """The paper's Tables 7 and 8: every task."""
    body = []
    for row in with_ratios(rows):
        measured, seconds = row["status"] == "measured", row["seconds"]
        memory = None
        if row["model"] == paper_results.MODEL and row["task"] in paper_results.PEAK_MB:
            memory = paper_results.paper_ratio(paper_results.PEAK_MB[row["task"]], row["method"])
        parts = [
            # A CUDA graph is timed as a whole.
            duration(seconds[part]) if measured and part in seconds else "-"
            for part in ("forward", "backward", "step")
        ]
        peak = row["peak_bytes"]
        body.append(
            (
                row["model"],
                row["task"],
                f"{row['batch']} x {row['tokens'] // row['batch']}",
                f"{row['nonzero_tokens'] / row['tokens']:.0%}",
                row["method"],
                number(row["steps_per_second"]) if measured else row["status"],
                number(row["steps_per_second_ratio"], unit="x"),
                *parts,
                number(None if peak is None else peak / 2**20, ",.0f"),
                number(row["peak_bytes_ratio"], unit="x"),
                number(memory, unit="x"),
                row["about"],
            )
        )
    head = ("model", "task", "batch", "filled", "method", "steps/s", "to regular")
    parts_head = ("forward", "backward", "step", "peak MiB", "to regular", "paper", "how")
    return render((*head, *parts_head), body)


def operators_table(op: str, benchmarks: Rows) -> str:
    """One line per case: ours, how far from the bound, and how many times slower each peer is."""
    cases: dict[tuple[str, str, str, str], dict[str, dict[str, Any]]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("op") != op:
            continue
        key = (info["device"], benchmark["file_backend"], info["case"], info["cache"])
        cases.setdefault(key, {})[info["contender"]] = benchmark
    peers = list(dict.fromkeys(name for found in cases.values() for name in found))
    peers = [name for name in peers if name not in ("ours", "bound")]
    body = []
    for (device, backend, case, cache), found in cases.items():
        if "ours" not in found:
            continue
        ours = found["ours"]
        body.append(
            (
                device,
                backend,
                case,
                cache,
                duration(ours["stats"]["median"]),
                number(ours["extra_info"]["times_bound"], unit="x"),
                *(
                    number(found[name]["extra_info"]["times_ours"], unit="x")
                    if name in found
                    else "-"
                    for name in peers
                ),
            )
        )
    head = ("device", "backend", "case", "L2", "ours", "over bound")
    return render((*head, *peers), body)


def crossings_table(curves: Rows) -> str:
    body = [
        (
            curve["axis"],
            ", ".join(f"{name} {value:g}" for name, value in curve["fixed"].items()),
            pair,
            ", ".join(f"{value:.3g}" for value in at) or "nowhere in the range",
        )
        for curve in curves
        for pair, at in curve["crossings"].items()
    ]
    return render(("axis", "at", "the same cost for", "where"), body)


def communication_table(rows: Rows) -> str:
    body = [
        (
            row["model"],
            str(row["ranks"]),
            row["method"],
            f"{row['bytes'] / 1e6:,.1f}",
            f"{1e3 * row['seconds']:.2f}",
        )
        for row in rows
    ]
    return render(("model", "ranks", "method", "MB per rank and step", "ms"), body)


def provenance_table(documents: Iterable[tuple[str, dict[str, Any]]]) -> str:
    documents = list(documents)
    keys = ("date", "commit", "device", "card", "CPU", "SIMD", "OS", "torch", "CUDA", "triton")
    keys += ("driver, clock, power", "Python", "sparsegrad_kernels", "SPARSEGRAD_BACKEND")
    body = []
    for key in keys:
        values = [str(found.get(key, "-")) for _, found in documents]
        if any(value != "-" for value in values):
            body.append((key, *values))
    table = render(("", *(name for name, _ in documents)), body)
    return table.replace(" class=n", "")  # nothing here is to be compared digit by digit
