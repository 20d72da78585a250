"""Does SparseGrad suit this model? The paper's Figures 2 and 3, for a model of one's own.

A `Recorder` watches a converted model while it trains, and returns plain data; `draw` makes figures
of them with matplotlib.

    recorder = Recorder(model, every=10)
    with recorder:
        ...                                       # any training loop
    for name, figure in draw(recorder.diagnosis()).items():
        figure.savefig(f"{name}.png")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .basis import Basis, energy_rank
from .linear import SparseGradLinear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Diagnosis", "LayerRecord", "Recorder", "draw", "nonzero_shares", "topk_energy"]


def nonzero_shares(g: Tensor) -> tuple[float, float, float]:
    """Shares of the rows, columns and entries of `g [T, out]` that are not zero (Figure 3)."""
    mask = g != 0
    return (
        mask.any(1).float().mean().item(),
        mask.any(0).float().mean().item(),
        mask.float().mean().item(),
    )


def topk_energy(matrix: Tensor, k: int) -> float:
    """Share of the squared Frobenius norm that the k largest entries hold; NaN of a zero matrix."""
    squares = matrix.detach().double().square().flatten()
    return (squares.topk(min(k, squares.shape[0])).values.sum() / squares.sum()).item()


@dataclass
class LayerRecord:
    """What was seen of one layer. Lists have one entry for each step looked at.

    Args:
        k: how many entries of its gradient are kept.
        steps: which steps (backward passes of this layer), from 0.
        nonzero_rows, nonzero_cols, nonzero_entries: shares of the gradient of the output `[T, out]`
            that are not zero; rows are tokens.
        kept_energy: share of the energy of the gradient `[out, in]` that the k largest entries of
            its rotated form hold, which is what the layer trains with.
        kept_energy_original: the same in the original basis, which is MeProp's.
        grad_output: magnitudes of the last gradient of the output, tokens in order `[T, out]`.
        gradient, rotated: magnitudes of the last weight gradient `[out, in]`, and in the HOSVD
            basis `[r_out, r_in]` (Figure 2).
        basis: the layer's basis, None: the identity.
    """

    k: int
    basis: Basis | None
    steps: list[int] = field(default_factory=list)
    nonzero_rows: list[float] = field(default_factory=list)
    nonzero_cols: list[float] = field(default_factory=list)
    nonzero_entries: list[float] = field(default_factory=list)
    kept_energy: list[float] = field(default_factory=list)
    kept_energy_original: list[float] = field(default_factory=list)
    grad_output: Tensor | None = None
    gradient: Tensor | None = None
    rotated: Tensor | None = None


Diagnosis = dict[str, LayerRecord]


class Recorder:
    """Looks at every `every`-th backward pass of a converted model's SparseGrad layers.

    Such a pass makes the dense gradients too, and so costs about what regular fine-tuning does.
    Training itself is not changed.

    Args:
        model: has `SparseGradLinear` layers.
        every: look at each n-th backward pass of a layer.
        layers: names of the layers to look at; by default the last layer of each role.

    Raises:
        ValueError: there is no such layer, or `every` is less than 1.
    """

    def __init__(self, model: nn.Module, every: int = 10, layers: list[str] | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        found = {n: m for n, m in model.named_modules() if isinstance(m, SparseGradLinear)}
        if not found:
            raise ValueError("model has no SparseGradLinear: convert it first")
        if layers is None:
            layers = list({re.sub(r"\d+", "", name): name for name in found}.values())
        if unknown := sorted(set(layers) - set(found)):
            raise ValueError(f"layers must be among {sorted(found)}, got {unknown}")
        self.every = every
        self._layers = {name: found[name] for name in layers}
        self._passes = dict.fromkeys(layers, 0)
        self._records = {n: LayerRecord(m.k, m.basis) for n, m in self._layers.items()}
        self._handles: list[Any] = []

    def diagnosis(self) -> Diagnosis:
        """What has been seen so far, by the layer's name."""
        return {name: record for name, record in self._records.items() if record.steps}

    def __enter__(self) -> Recorder:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._watcher(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watcher(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def watch(layer: nn.Module, args: Any, output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            output.register_hook(lambda g: self._look(name, x, g))

        return watch

    @torch.no_grad()
    def _look(self, name: str, x: Tensor, g: Tensor) -> None:
        step = self._passes[name]
        self._passes[name] += 1
        if step % self.every:
            return
        record = self._records[name]
        x, g = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()
        gradient = rotated = g.T @ x
        if record.basis is not None:
            u, v = record.basis.u, record.basis.v
            rotated = rotated if u is None else rotated @ u.float().T
            rotated = rotated if v is None else v.float() @ rotated
        total = gradient.double().square().sum().item()
        share = rotated.double().square().sum().item() / total if total else torch.nan
        record.steps.append(step)
        rows, cols, entries = nonzero_shares(g)
        record.nonzero_rows.append(rows)
        record.nonzero_cols.append(cols)
        record.nonzero_entries.append(entries)
        record.kept_energy.append(topk_energy(rotated, record.k) * share)
        record.kept_energy_original.append(topk_energy(gradient, record.k))
        record.grad_output, record.gradient, record.rotated = (
            each.abs().cpu() for each in (g, gradient, rotated)
        )


# ---- Drawing ----


def _pooled(matrix: Tensor, size: int) -> Tensor:
    """The largest magnitudes of at most `size x size` tiles: single entries stay visible."""
    target = [min(n, size) for n in matrix.shape]
    return nn.functional.adaptive_max_pool2d(matrix[None, None], target)[0, 0]


def _panels(diagnosis: Diagnosis, columns: int, height: float) -> tuple[Figure, Iterator[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(4.6 * columns if columns > 1 else 7.0, height * len(diagnosis)),
        layout="constrained",
    )
    axes = figure.subplots(len(diagnosis), columns, squeeze=False)
    return figure, iter(axes)


def _show(figure: Figure, axes: Any, matrix: Tensor, title: str, size: int = 320) -> None:
    from matplotlib.colors import LogNorm

    pooled = _pooled(matrix, size)
    top = float(pooled.max()) or 1.0
    image = axes.imshow(
        pooled.clamp_min(1e-4 * top).numpy(),
        norm=LogNorm(1e-4 * top, top),
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=(0, matrix.shape[1], matrix.shape[0], 0),
    )
    figure.colorbar(image, ax=axes, pad=0.01)
    axes.set_title(title, fontsize=9)


def draw(diagnosis: Diagnosis) -> dict[str, Figure]:
    """Figures by name: "gradients", "grad_output", "nonzeros", "energy", "spectra".

    Args:
        diagnosis: of a `Recorder`, with at least one layer.

    Raises:
        ValueError: nothing was recorded.
    """
    if not diagnosis:
        raise ValueError("diagnosis is empty: no backward pass was recorded")
    figures = {
        "gradients": _draw_gradients(diagnosis),
        "grad_output": _draw_grad_output(diagnosis),
        "nonzeros": _draw_over_steps(
            diagnosis,
            "not zero, %",
            {
                "tokens (rows)": "nonzero_rows",
                "outputs (columns)": "nonzero_cols",
                "entries": "nonzero_entries",
            },
        ),
        "energy": _draw_over_steps(
            diagnosis,
            "energy in the k largest entries, %",
            {"HOSVD basis": "kept_energy", "original basis (MeProp)": "kept_energy_original"},
        ),
    }
    spectra = _draw_spectra(diagnosis)
    if spectra is not None:
        figures["spectra"] = spectra
    return figures


def _draw_gradients(diagnosis: Diagnosis) -> Figure:
    figure, rows = _panels(diagnosis, 2, 3.6)
    for (name, record), (left, right) in zip(diagnosis.items(), rows, strict=True):
        assert record.gradient is not None and record.rotated is not None
        held, held_original = record.kept_energy[-1], record.kept_energy_original[-1]
        original = f"{name}\nas it is: top k hold {100 * held_original:.0f} % of the energy"
        _show(figure, left, record.gradient, original)
        rotated = (
            f"step {record.steps[-1]}, k = {record.k:,}\nin the HOSVD basis: {100 * held:.0f} %"
        )
        _show(figure, right, record.rotated, rotated)
        left.set_xlabel("in")
        left.set_ylabel("out")
        basis = record.basis
        right.set_xlabel("in" if basis is None or basis.u is None else "input vector")
        right.set_ylabel("out" if basis is None or basis.v is None else "output vector")
    return figure


def _draw_grad_output(diagnosis: Diagnosis) -> Figure:
    figure, rows = _panels(diagnosis, 1, 3.4)
    for (name, record), (axes,) in zip(diagnosis.items(), rows, strict=True):
        assert record.grad_output is not None
        share = 100 * record.nonzero_rows[-1]
        title = f"{name}\ngradient of the output: {share:.0f} % of the tokens have one"
        _show(figure, axes, record.grad_output, title)
        axes.set_xlabel("out")
        axes.set_ylabel("token")
    return figure


def _draw_over_steps(diagnosis: Diagnosis, label: str, curves: dict[str, str]) -> Figure:
    figure, rows = _panels(diagnosis, 1, 2.6)
    for (name, record), (axes,) in zip(diagnosis.items(), rows, strict=True):
        for title, attribute in curves.items():
            values = [100 * value for value in getattr(record, attribute)]
            axes.plot(record.steps, values, marker=".", label=title)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel(label, fontsize=8)
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _spectra(basis: Basis) -> dict[str, Tensor]:
    """The energies that are known, by mode."""
    energies = {"in": basis.energy_in, "out": basis.energy_out}
    return {mode: energy for mode, energy in energies.items() if energy is not None}


def _draw_spectra(diagnosis: Diagnosis) -> Figure | None:
    """Energy outside the leading vectors, and the ranks that `energy=...` would keep."""
    known = {
        name: record
        for name, record in diagnosis.items()
        if record.basis is not None and _spectra(record.basis)
    }
    if not known:
        return None
    figure, rows = _panels(known, 2, 2.9)
    for (name, record), pair in zip(known.items(), rows, strict=True):
        assert record.basis is not None
        spectra = _spectra(record.basis)
        for axes, mode in zip(pair, ("in", "out"), strict=True):
            if mode not in spectra:
                axes.set_axis_off()
                continue
            energy = spectra[mode].double().cpu()
            left = 1 - energy.cumsum(0) / energy.sum()
            axes.semilogy(range(1, len(energy) + 1), left.clamp_min(1e-6).numpy())
            for share in (0.9, 0.95, 0.99):
                rank = energy_rank(f"energy_{mode}", energy, share, len(energy))
                axes.axvline(rank, color="0.6", linewidth=0.8)
                axes.annotate(f"{share:g}: {rank}", (rank, 1e-5), rotation=90, fontsize=7)
            axes.set_title(f"{name}: {mode}", fontsize=9)
            axes.set_xlabel("rank kept")
            axes.set_ylabel("energy left out", fontsize=8)
            axes.set_ylim(1e-6, 1.5)
            axes.grid(alpha=0.3)
    return figure
