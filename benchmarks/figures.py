"""The report's figures: each function draws one and returns it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib
import paper_results
from tables import REFERENCE, average_over_tasks, with_ratios

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = {
    "dense": "#000000",
    "regular FT": "#000000",
    "LoRA": "#E69F00",
    "MeProp": "#CC79A7",
    "paper": "#D55E00",
    "truncated": "#56B4E9",
    "one side": "#009E73",
    "SparseGrad": "#0072B2",
    "bound": "#999999",
}
_MARKERS = "osD^v<>P"
Rows = Iterable[dict[str, Any]]


def colour(name: str) -> str:
    if name.startswith("paper"):
        return _COLOURS["paper"]
    if "smaller modes" in name or "of the input" in name:
        return _COLOURS["one side"]
    if name.startswith("SparseGrad,") and "COO" not in name:
        return _COLOURS["truncated"]
    return next((value for key, value in _COLOURS.items() if name.startswith(key)), "#F0E442")


def _finish(axes: Any, **settings: Any) -> None:
    axes.set(**settings)
    axes.grid(True, which="major", color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plain_logarithmic(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def training(rows: Rows) -> Figure:
    """Speed and memory as ratios to regular fine-tuning, averaged over the tasks."""
    averages = with_ratios(average_over_tasks(rows))
    models = list(dict.fromkeys(row["model"] for row in averages))
    methods = list(dict.fromkeys(row["method"] for row in averages))
    figure, grid = plt.subplots(
        len(models),
        2,
        figsize=(11, 0.9 + 0.34 * len(methods) * len(models)),
        squeeze=False,
        layout="constrained",
    )
    for (left, right), model in zip(grid, models, strict=True):
        found = {row["method"]: row for row in averages if row["model"] == model}
        for axes, name, paper, title in (
            (left, "steps_per_second_ratio", paper_results.STEPS_PER_SECOND, "speed"),
            (right, "peak_bytes_ratio", paper_results.PEAK_MB["AVG"], "peak memory"),
        ):
            for place, method in enumerate(methods):
                row = found.get(method)
                ratio = row and row[name]
                if ratio is None:
                    text = row["status"] if row else "not run"
                    if text == "measured":
                        text = f"no ratio: {REFERENCE} is missing"
                    axes.text(0.01, place, text, va="center", fontsize=8, color="#666666")
                    continue
                axes.barh(place, ratio, color=colour(method), height=0.7)
                beside = axes.get_yaxis_transform()  # clear of the bars and of the paper's marks
                axes.text(1.01, place, f"{ratio:.2f}", va="center", fontsize=8, transform=beside)
                theirs = paper_results.paper_ratio(paper, method)
                if model == paper_results.MODEL and theirs is not None:
                    axes.plot(theirs, place, "D", color="white", markeredgecolor="black")
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set_yticks(range(len(methods)), methods if axes is left else [], fontsize=8)
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.margins(x=0.12)
            note = " (diamond: the paper)" if model == paper_results.MODEL else ""
            _finish(axes, title=f"{model}: {title} to {REFERENCE}{note}", xlim=(0, None))
            axes.title.set_fontsize(9)
    return figure


def scaling(curves: list[dict[str, Any]]) -> Figure:
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axes, curve in zip(grid.flat, curves, strict=False):
        values = [point["value"] for point in curve["points"]]
        for marker, name in zip(_MARKERS, curve["points"][0]["seconds"], strict=False):
            seconds = [1e3 * point["seconds"][name] for point in curve["points"]]
            style = {"linestyle": "--"} if name == "bound" else {"marker": marker}
            axes.loglog(values, seconds, color=colour(name), label=name, markersize=5, **style)
        for at in curve["crossings"].get("SparseGrad and dense", []):
            axes.axvline(at, color=colour("SparseGrad"), linewidth=0.8, linestyle=":")
        axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=8)
        axes.set_xticks([], minor=True)
        _plain_logarithmic(axes.yaxis)
        fixed = ", ".join(f"{n} {v:g}" for n, v in curve["fixed"].items())
        _finish(axes, xlabel=curve["axis"], ylabel="milliseconds a step", title=fixed)
        axes.title.set_fontsize(9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def roofline(benchmarks: list[dict[str, Any]], roofs: dict[str, Any], device: str) -> Figure:
    """Left: products under the roof. Right: what only moves memory, as a share of bandwidth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    ours = [b for b in benchmarks if b["extra_info"]["contender"] == "ours"]
    bandwidth = roofs["bytes_per_second"]
    products = [b for b in ours if b["extra_info"]["flops"]]
    dtypes = list(roofs["flops_per_second"])  # of all that took part
    intensities = [b["extra_info"]["flops"] / b["extra_info"]["bytes"] for b in products]
    ridges = [roofs["flops_per_second"][dtype] / bandwidth for dtype in dtypes]
    span = [min(intensities + ridges) / 4, max(intensities + ridges) * 4]
    shades = dict(zip(dtypes, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=False))
    for dtype, ridge in zip(dtypes, ridges, strict=True):
        peak = roofs["flops_per_second"][dtype]
        line = (span[0], ridge, span[1])
        left.loglog(
            line,
            [min(peak, bandwidth * x) / 1e9 for x in line],
            color=shades[dtype],
            label=f"roof, {dtype}",
        )
    names = list(dict.fromkeys(b["extra_info"]["op"] for b in products))
    for marker, name in zip(_MARKERS, names, strict=False):
        mine = [b for b in products if b["extra_info"]["op"] == name]
        left.scatter(
            [b["extra_info"]["flops"] / b["extra_info"]["bytes"] for b in mine],
            [b["extra_info"]["flops"] / b["stats"]["median"] / 1e9 for b in mine],
            marker=marker,
            s=26,
            facecolors=[shades[b["extra_info"]["dtype"]] for b in mine],
            edgecolors="black",
            linewidths=0.5,
            label=name,
        )
    _finish(left, xlabel="flops per byte that has to move", ylabel="Gflop/s", title=f"{device}")
    left.legend(fontsize=7)
    for axis in (left.xaxis, left.yaxis):
        _plain_logarithmic(axis)
    _moved_memory(right, [b for b in ours if not b["extra_info"]["flops"]], bandwidth)
    return figure


def _moved_memory(axes: Any, benchmarks: list[dict[str, Any]], bandwidth: float) -> None:
    names = list(dict.fromkeys(b["extra_info"]["op"] for b in benchmarks))
    for place, name in enumerate(names):
        shares = [
            b["extra_info"]["bytes"] / b["stats"]["median"] / bandwidth
            for b in benchmarks
            if b["extra_info"]["op"] == name
        ]
        axes.plot(shares, [place] * len(shares), "o", color="#0072B2", alpha=0.6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.axvline(1, color="black", linewidth=0.8)
    _finish(
        axes,
        xlim=(0, None),
        xlabel="bytes that have to move, over time and read bandwidth",
        title=f"bandwidth {bandwidth / 1e9:.0f} GB/s (above 1: from cache)",
    )


def peers(benchmarks: list[dict[str, Any]]) -> Figure:
    """Every operator's first case: how many times slower each peer and the reference are."""
    first: dict[str, str] = {}
    for benchmark in benchmarks:
        first.setdefault(benchmark["extra_info"]["op"], benchmark["group"])
    bars = [
        (b["extra_info"]["op"], b["extra_info"]["contender"], b["extra_info"]["times_ours"])
        for b in benchmarks
        if b["group"] == first[b["extra_info"]["op"]] and b["extra_info"]["contender"] != "ours"
    ]
    figure, axes = plt.subplots(figsize=(11, 0.8 + 0.27 * len(bars)), layout="constrained")
    for place, (_, contender, ratio) in enumerate(bars):
        shade = {"bound": "#999999", "reference": "#56B4E9"}.get(contender, "#0072B2")
        axes.barh(place, ratio, color=shade, height=0.75)
        axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
    labels = [f"{op}: {contender}" for op, contender, _ in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain_logarithmic(axes.xaxis)
    axes.margins(x=0.08, y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    case = benchmarks[0]["extra_info"]["case"] if benchmarks else ""
    _finish(axes, xlabel="time over ours (right of the line: ours is faster)", title=case)
    return figure


def communication(rows: list[dict[str, Any]]) -> Figure:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = plt.subplots(
        1, len(models), figsize=(11, 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, model in zip(grid[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for marker, method in zip(_MARKERS, dict.fromkeys(r["method"] for r in mine), strict=False):
            points = [(r["ranks"], r["bytes"] / 1e6) for r in mine if r["method"] == method]
            axes.loglog(
                *zip(*points, strict=True), marker=marker, color=colour(method), label=method
            )
        ranks = sorted({row["ranks"] for row in mine})
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xticks([], minor=True)
        _finish(axes, title=model, xlabel="ranks")
    grid[0, 0].set_ylabel("MB per rank and step")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure
