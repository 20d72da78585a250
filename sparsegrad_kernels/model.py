"""A whole model: convert its linears, merge them back, save and load what training changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ._files import save_safetensors
from .basis import Basis
from .config import SparseGradConfig, Target, find_targets, is_conv1d, wanted_modes
from .linear import SparseGradLinear, WeightSpace

Model = TypeVar("Model", bound=nn.Module)
_FORMAT = "sparsegrad_kernels.model.1"


class SparseGradConv1D(SparseGradLinear):
    """SparseGradLinear in the place of transformers' Conv1D: `state_dict` has `weight.T`."""

    @classmethod
    def from_conv1d(cls, conv: nn.Module, **kwargs: Any) -> SparseGradConv1D:
        weight, bias = cast(Tensor, conv.weight), cast(nn.Parameter, conv.bias)
        linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
        linear.weight = nn.Parameter(weight.detach().T.contiguous())
        linear.bias = bias
        layer = cast(SparseGradConv1D, cls.from_linear(linear.train(conv.training), **kwargs))
        layer.conv1d_type = type(conv)
        return layer

    def to_conv1d(self) -> nn.Module:
        linear = self.to_linear()
        with torch.device("meta"):
            conv = self.conv1d_type(self.out_features, self.in_features)
        conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        conv.bias = linear.bias
        return conv.train(self.training)

    conv1d_type: Any

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_space == "original":
            destination[prefix + "weight"] = destination[prefix + "weight"].T

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and self.weight_space == "original":
            state_dict[prefix + "weight"] = weight.T
        super()._load_from_state_dict(state_dict, prefix, *args)


def _convert_module(module: nn.Module, **kwargs: Any) -> SparseGradLinear:
    if is_conv1d(module):
        return SparseGradConv1D.from_conv1d(module, **kwargs)
    return SparseGradLinear.from_linear(cast(nn.Linear, module), **kwargs)


def convert(
    model: Model,
    basis: Mapping[str, Basis] | None,
    config: SparseGradConfig | None = None,
) -> Model:
    """Put a `SparseGradLinear` in the place of every linear that `config` selects.

    What else is trained is left as it is: freeze it where only these layers are to be.

    Args:
        model: changed in place, and returned.
        basis: from `fit_basis`, with the same `config`; copied, so it can be used again. None is
            the identity: MeProp.
        config: which linears, density, truncation, weight space.

    Raises:
        ValueError: nothing matches, a group has no basis, or a basis has another shape; the model
            is then unchanged.
    """
    config = SparseGradConfig() if config is None else config
    targets = _find_unconverted(model, config)
    bases = _prepare_bases(targets, basis, config)
    layers = {
        name: _convert_module(
            target.module,
            basis=bases[target.group],
            density=config.density,
            weight_space=cast(WeightSpace, config.weight_space),
            stochastic_rounding=config.stochastic_rounding,
            delta_dtype=config.delta_dtype,
        )
        for name, target in targets.items()
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model


def _find_unconverted(model: nn.Module, config: SparseGradConfig) -> dict[str, Target]:
    if any(isinstance(module, SparseGradLinear) for module in model.modules()):
        raise ValueError("the model has SparseGradLinear layers already: merge it first")
    return find_targets(model, config)


def _prepare_bases(
    targets: Mapping[str, Target], basis: Mapping[str, Basis] | None, config: SparseGradConfig
) -> dict[str, Basis | None]:
    """One basis per group, truncated as `config` says, where the group's layers are."""
    prepared: dict[str, Basis | None] = {}
    for name, target in targets.items():
        if target.group in prepared:
            continue
        if basis is None:
            prepared[target.group] = None
            continue
        if target.group not in basis:
            raise ValueError(
                f"basis has no entry for {target.group!r}, needed by {name}; "
                f"it has {sorted(basis)}: was it fitted with the same config?"
            )
        weight = cast(Tensor, target.module.weight)
        found = basis[target.group]
        for mode, got, wanted in zip(
            ("out", "in"), (found.out_features, found.in_features), target.shape, strict=True
        ):
            if got is not None and got != wanted:
                raise ValueError(
                    f"basis {target.group!r} is for {mode}_features={got}, but {name} is "
                    f"{list(target.shape)}"
                )
        try:
            found = found.select(*wanted_modes(config.modes, target.shape))
        except ValueError as error:
            raise ValueError(
                f"basis {target.group!r}, needed by {name}: {error}: was it fitted with the same "
                "config.modes?"
            ) from None
        if config.energy is not None:
            found = found.truncate(energy=config.energy)
        elif config.ranks is not None:
            found = found.truncate(rank_out=config.ranks[0], rank_in=config.ranks[1])
        prepared[target.group] = found.matching(weight)
    return prepared


def _sparse_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLinear)
    }


def merge(model: Model) -> Model:
    """Put the equal plain linear in the place of every `SparseGradLinear`; in place.

    Raises:
        ValueError: there is none.
    """
    layers = _sparse_layers(model)
    if not layers:
        raise ValueError("the model has no SparseGradLinear to merge")
    for name, layer in layers.items():
        plain = layer.to_conv1d() if isinstance(layer, SparseGradConv1D) else layer.to_linear()
        model.set_submodule(name, plain)
    return model


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what training changes to one safetensors file: for `load` to go on from.

    That is: the converted layers, whole, with their bases and settings; every other parameter with
    `requires_grad`; and the buffers of the `state_dict`. The frozen rest is the base model's.

    Raises:
        ValueError: the model has no `SparseGradLinear`.
    """
    layers = _sparse_layers(model)
    if not layers:
        raise ValueError("the model has no SparseGradLinear: save it as any other model")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    bases: dict[int, str] = {}
    for name, layer in layers.items():
        basis = None
        if layer.basis is not None:
            basis = bases.setdefault(id(layer.basis), str(len(bases)))
            for key, tensor in layer.basis.tensors().items():
                tensors[f"basis.{basis}.{key}"] = tensor
        settings[name] = {
            "k": layer.k,
            "weight_space": layer.weight_space,
            "stochastic_rounding": layer.stochastic_rounding,
            "delta_dtype": None if layer.delta_dtype is None else str(layer.delta_dtype),
            "basis": basis,
        }
        for key, tensor in layer.state_dict().items():
            if key not in ("u", "v"):
                tensors[f"model.{name}.{key}"] = tensor
    inside = tuple(f"{name}." for name in layers)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith(inside):
            tensors[f"model.{name}"] = p
    state = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    for name in buffers & set(state):
        if not name.startswith(inside):
            tensors[f"model.{name}"] = state[name]
    metadata = {"format": _FORMAT, "layers": json.dumps(settings)}
    save_safetensors(tensors, Path(path), metadata)


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Convert the plain base `model`, in place, to what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, or the model has not the layers or shapes that it
            names; the model is then unchanged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no saved model at {os.fspath(path)}")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)} was not written by sparsegrad_kernels.save")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings = json.loads(metadata["layers"])
    modules = dict(model.named_modules())
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    layers = _saved_layers(settings, tensors, modules)
    _check_saved_state(model, layers, state)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.load_state_dict(state, strict=False)
    return model


def _saved_layers(
    settings: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> dict[str, SparseGradLinear]:
    bases: dict[str, Basis] = {}
    layers: dict[str, SparseGradLinear] = {}
    for name, setting in settings.items():
        module = modules.get(name)
        if module is None or not (type(module) is nn.Linear or is_conv1d(module)):
            found = "nothing" if module is None else type(module).__name__
            raise ValueError(f"the model has no plain linear at {name}, but {found}")
        basis, key = None, setting["basis"]
        if key is not None:
            if key not in bases:
                prefix = f"basis.{key}."
                factors = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
                bases[key] = _restored_basis(factors, cast(Tensor, module.weight))
            basis = bases[key]
        names = ("k", "weight_space", "stochastic_rounding")
        given = {name: setting[name] for name in names if name in setting}
        if dtype := setting.get("delta_dtype"):
            given["delta_dtype"] = getattr(torch, dtype.removeprefix("torch."), dtype)
        layers[name] = _convert_module(module, basis=basis, **given)
    return layers


def _restored_basis(factors: Mapping[str, Tensor], weight: Tensor) -> Basis:
    return Basis(**factors).matching(weight)


def _check_saved_state(
    model: nn.Module, layers: Mapping[str, SparseGradLinear], state: Mapping[str, Tensor]
) -> None:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, layer in layers.items():
        shapes.update({f"{name}.{key}": t.shape for key, t in layer.state_dict().items()})
    for name, tensor in state.items():
        if name not in shapes:
            raise ValueError(f"the model has no {name}, which the file holds")
        if shapes[name] != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(shapes[name])} in the model"
            )
