"""What is converted and how: SparseGradConfig, and the linears of a model that it selects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The MLP linears of one block, by `model.config.model_type`: patterns for the whole module name.
_BERT_MLP = r"(?:.*\.)?layer\.\d+\.(?:intermediate|output)\.dense"
_LLAMA_MLP = r"(?:.*\.)?layers\.\d+\.mlp\.(?:up|down)_proj"
TARGET_MODULES = {
    "bert": _BERT_MLP,
    "roberta": _BERT_MLP,
    "deberta": _BERT_MLP,
    "deberta-v2": _BERT_MLP,
    "distilbert": r"(?:.*\.)?layer\.\d+\.ffn\.lin[12]",
    "gpt2": r"(?:.*\.)?h\.\d+\.mlp\.c_(?:fc|proj)",
    "llama": _LLAMA_MLP,
    "mistral": _LLAMA_MLP,
    "qwen2": _LLAMA_MLP,
}

MODES = ("both", "smaller", "in", "out")
_DELTA_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_delta_dtype(dtype: object, weight_space: str) -> None:
    """Raise a ValueError where `delta`, and so an optimizer's moments, cannot have this dtype."""
    if dtype not in _DELTA_DTYPES:  # float16 has no room for the squares of gradients
        names = ", ".join(map(str, _DELTA_DTYPES))
        raise ValueError(f"delta_dtype must be None or one of {names}, got {dtype!r}")
    if weight_space != "original":
        raise ValueError(f"delta_dtype is for the original space, got the {weight_space} one")


@dataclass(frozen=True)
class SparseGradConfig:
    """Settings of SparseGrad.

    Args:
        density: share of each weight gradient's entries to keep; the paper takes 0.01 for BERT and
            RoBERTa and 0.002 for LLaMA (sections 5.1 and 5.2).
        target_modules: which linears to convert: a list of names or name endings at a dot
            (`["mlp.up_proj"]`), or a regular expression for the whole name; None: the MLP layers
            of a known `model.config.model_type`.
        layers: which blocks, by the first number in a module's name: a list of numbers, or a slice
            as a string (`"::3"` is every third, the paper's choice for LLaMA); None: all.
        energy: truncate each basis to the leading vectors that hold this share of the gradient's
            energy in each mode (design 2.3), their number rounded up to a multiple of 8 as
            `Basis.truncate` does; None: no truncation.
        ranks: truncate to `(r_out, r_in)` vectors instead, taken as given; on a GPU multiples of 8
            are the fastest.
        modes: which of the gradient's modes get a basis; the other is left as it is. "both" is
            the paper's HOSVD; "in" and "out" are one; "smaller" is the one of the smaller side of
            each linear, which in MLP layers is the model's hidden size, not the neurons. That
            costs far less: for 768 x 3072 a basis of 768^2 numbers, and no more than 768^2
            multiply-adds a token with a gradient.
        shared_basis: one basis for all layers of the same role and shape, as in the paper, or one
            for each layer.
        weight_space, stochastic_rounding, delta_dtype: see `SparseGradLinear`.

    Raises:
        TypeError, ValueError: a setting is outside its range.
    """

    density: float = 0.01
    target_modules: str | Sequence[str] | None = None
    layers: str | Sequence[int] | None = None
    energy: float | None = None
    ranks: tuple[int, int] | None = None
    modes: str = "both"
    shared_basis: bool = True
    weight_space: str = "original"
    stochastic_rounding: bool = False
    delta_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], got {self.energy}")
        if self.energy is not None and self.ranks is not None:
            raise ValueError("energy and ranks both truncate the basis: give one of them")
        if self.ranks is not None and (len(self.ranks) != 2 or min(self.ranks) < 1):
            raise ValueError(f"ranks must be (r_out, r_in), each at least 1, got {self.ranks}")
        if self.modes not in MODES:
            raise ValueError(f"modes must be one of {', '.join(MODES)}, got {self.modes!r}")
        if self.ranks is not None and self.modes != "both":
            raise ValueError(f"ranks truncates both modes, but modes is {self.modes!r}: use energy")
        if self.weight_space not in ("original", "transformed"):
            raise ValueError(
                f'weight_space must be "original" or "transformed", got {self.weight_space!r}'
            )
        if self.delta_dtype is not None:
            check_delta_dtype(self.delta_dtype, self.weight_space)
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules is no regular expression: {self.target_modules!r}: {error}"
                ) from None
        if isinstance(self.layers, str):
            _parse_slice(self.layers)


def _parse_slice(text: str) -> slice:
    try:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    except (ValueError, TypeError):
        raise ValueError(f'layers must look like "start:stop:step", got {text!r}') from None


@dataclass(frozen=True)
class Target:
    """A linear to convert: its module, and the group with whom it shares a basis."""

    module: nn.Module
    group: str

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        out_features, in_features = _shape(self.module)
        return out_features, in_features


def wanted_modes(modes: str, shape: tuple[int, int]) -> tuple[bool, bool]:
    """Whether the modes `in` and `out` of a weight `(out, in)` get a basis."""
    if modes == "smaller":
        modes = "in" if shape[1] <= shape[0] else "out"
    return modes in ("both", "in"), modes in ("both", "out")


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is `[in, out]`."""
    return type(module).__qualname__ == "Conv1D" and type(module).__module__.startswith(
        "transformers."
    )


def is_linear(module: nn.Module) -> bool:
    # Subclasses may hold packed or quantised weights, which this package could not train.
    return type(module) is nn.Linear or is_conv1d(module)


def linear_view(module: nn.Module, tensor: Tensor) -> Tensor:
    """A linear's weight, or its gradient, as `[out, in]`."""
    return tensor.T if is_conv1d(module) else tensor


def find_targets(model: nn.Module, config: SparseGradConfig) -> dict[str, Target]:
    """The linears of `model` that `config` selects, by name.

    Raises:
        ValueError: nothing matches; the message lists what could be chosen.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    pattern = config.target_modules
    if pattern is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in TARGET_MODULES:
            raise ValueError(
                f"target_modules is needed: model type {model_type!r} is not one of "
                f"{', '.join(TARGET_MODULES)}. {_candidates(linears)}"
            )
        pattern = TARGET_MODULES[model_type]
    names = [name for name in linears if _matches(name, pattern)]
    if not names:
        raise ValueError(f"target_modules {pattern!r} matches no linear. {_candidates(linears)}")
    chosen = _in_layers(names, config.layers)
    if not chosen:
        raise ValueError(f"layers {config.layers!r} leaves none of the blocks of {names}")
    if not config.shared_basis:
        return {name: Target(linears[name], name) for name in chosen}
    shapes: dict[str, set[torch.Size]] = {}
    for name in chosen:
        shapes.setdefault(_role(name), set()).add(_shape(linears[name]))
    targets = {}
    for name in chosen:
        group, shape = _role(name), _shape(linears[name])
        if len(shapes[group]) > 1:
            group = f"{group} {shape[0]}x{shape[1]}"
        targets[name] = Target(linears[name], group)
    return targets


def _shape(module: Any) -> torch.Size:
    return linear_view(module, module.weight).shape


def _matches(name: str, pattern: str | Sequence[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def _block(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _role(name: str) -> str:
    """`"encoder.layer.3.intermediate.dense"` has the role `"intermediate.dense"`."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(part for part in parts[first + 1 :] if not part.isdigit()) or name


def _in_layers(names: list[str], layers: str | Sequence[int] | None) -> list[str]:
    if layers is None:
        return names
    blocks = {block for name in names if (block := _block(name)) is not None}
    wanted: set[int] = set(layers) if not isinstance(layers, str) else set()
    if isinstance(layers, str):
        wanted = set(range(max(blocks, default=-1) + 1)[_parse_slice(layers)])
    elif missing := wanted - blocks:
        raise ValueError(f"layers names blocks that the model lacks: {sorted(missing)}")
    return [name for name in names if _block(name) in wanted]


def _candidates(linears: dict[str, nn.Module]) -> str:
    roles = sorted({_role(name) for name in linears})
    return f"Linears of this model: {', '.join(roles) or 'none'}"
