"""What a run leaves behind: the table, the metrics, the curves, the models."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..diagnostics import Diagnosis, draw


@dataclass(frozen=True)
class Result:
    """One method's row."""

    method: str
    about: str
    trained_numbers: int
    metric: str
    score: float
    steps: int
    steps_per_second: float
    peak_bytes: int | None
    lr: float
    losses: list[float]


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    rows = [("method", "trained numbers", results[0].metric, "steps/s", "peak memory", "lr")]
    for r in results:
        memory = "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:,.0f} MiB"
        rows.append(
            (
                r.method,
                f"{r.trained_numbers:,}",
                f"{r.score:.3f}" if r.metric == "pearson" else f"{100 * r.score:.1f} %",
                f"{r.steps_per_second:.2f}",
                memory,
                f"{r.lr:g}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def write_metrics(path: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    content = {**about, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def plot_losses(path: Path, results: Sequence[Result]) -> None:
    """Loss curves, smoothed over a twentieth of the run, the raw ones behind them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, result in enumerate(results):
        losses, width = result.losses, max(1, len(result.losses) // 20)
        smooth = [
            sum(losses[max(0, j - width + 1) : j + 1]) / min(j + 1, width)
            for j in range(len(losses))
        ]
        axes.plot(range(1, len(losses) + 1), losses, color=f"C{i}", alpha=0.2, linewidth=0.8)
        axes.plot(range(1, len(losses) + 1), smooth, color=f"C{i}", label=result.method)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_diagnosis(folder: Path, diagnosis: Diagnosis) -> None:
    """The figures of `diagnostics.draw`, and the numbers behind those over steps."""
    folder.mkdir()
    numbers = {
        layer: {
            name: value for name, value in vars(record).items() if isinstance(value, (int, list))
        }
        for layer, record in diagnosis.items()
    }
    (folder / "diagnosis.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    for name, figure in draw(diagnosis).items():
        figure.savefig(folder / f"{name}.png", dpi=110)


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well, and is removed if not.

    Raises:
        FileExistsError: `out` exists and is no empty folder.
        OSError: it cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists and is not an empty folder: choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
