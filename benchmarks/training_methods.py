"""How each method readies a model for training: `METHODS` by the name in the tables.

As in the paper (section 5.1) everything but the MLP weights is trained by AdamW in every method,
the MLP weights by the method. Of the LLaMA block, as there (section 5.2), only `up_proj` and
`down_proj` are trained at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import models
import torch
from paper import PaperLinear, Product, regular, sparse_by_dense
from torch import nn

from sparsegrad_kernels import Basis, SparseAdam, convert
from sparsegrad_kernels.config import find_targets, wanted_modes

_LR = 1e-6  # nothing is learnt from random labels


@dataclass
class Ready:
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    about: str


Bases = Mapping[str, Basis]
Prepare = Callable[[nn.Module, str, Bases], Ready]


def _freeze(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The MLP linears, of which only the biases are left to train; the rest as the paper has it."""
    targets = {
        path: target.module
        for path, target in find_targets(model, models.sparsegrad_config(name)).items()
    }
    model.requires_grad_(name != "llama-7b-block")
    for linear in targets.values():
        linear.weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(True)
    return targets


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _adamw(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, lr=_LR, fused=True)] if parameters else []


def _regular(model: nn.Module, name: str, bases: Bases) -> Ready:
    for linear in _freeze(model, name).values():
        linear.weight.requires_grad_(True)
    return Ready(model, _adamw(_trained(model)), "fused AdamW")


def _lora(model: nn.Module, name: str, bases: Bases) -> Ready:
    import peft

    targets = list(_freeze(model, name))
    others = _trained(model)
    rank = models.LORA_RANK.get(name, 7)
    config = peft.LoraConfig(r=rank, target_modules=targets, lora_dropout=0.0)
    lora = peft.get_peft_model(model, config)
    for parameter in others:  # peft has frozen them
        parameter.requires_grad_(True)
    return Ready(lora, _adamw(_trained(lora)), f"peft, r={rank}, fused AdamW")


def _sparse_adam(model: nn.Module, about: str, beta1: float = 0.9) -> Ready:
    return Ready(model, [SparseAdam(_trained(model), lr=_LR, betas=(beta1, 0.999))], about)


def _meprop(model: nn.Module, name: str, bases: Bases) -> Ready:
    _freeze(model, name)
    convert(model, None, models.sparsegrad_config(name))
    return _sparse_adam(model, "identity basis, this package's kernels")


def _sparsegrad(
    energy: float | None = None,
    modes: str = "both",
    delta_dtype: torch.dtype | None = None,
    beta1: float = 0.9,
) -> Prepare:
    def prepare(model: nn.Module, name: str, bases: Bases) -> Ready:
        _freeze(model, name)
        # A copy of the bases, so that they count as this method's memory.
        config = models.sparsegrad_config(name, energy)
        config = replace(config, modes=modes, delta_dtype=delta_dtype)
        targets = find_targets(model, config)
        shapes = {target.group: target.shape for target in targets.values()}
        own = {
            group: copy.deepcopy(basis.select(*wanted_modes(modes, shapes[group])))
            for group, basis in bases.items()
        }
        convert(model, own, config)
        # One of each group: what the truncation left, of the modes that have a basis.
        kept = {
            f"{layer.basis.rank_out or '-'}x{layer.basis.rank_in or '-'}"
            for layer in model.modules()
            if getattr(layer, "basis", None) is not None
        }
        return _sparse_adam(model, f"basis {', '.join(sorted(kept))}", beta1)

    return prepare


def _paper(product: Product) -> Prepare:
    def prepare(model: nn.Module, name: str, bases: Bases) -> Ready:
        _freeze(model, name)
        own, config = copy.deepcopy(dict(bases)), models.sparsegrad_config(name)
        weights = []
        for path, target in find_targets(model, config).items():
            linear, basis = target.module, own[target.group]
            k = max(1, round(config.density * linear.weight.numel()))
            own[target.group] = basis = basis.matching(linear.weight)  # one for all its layers
            layer = PaperLinear(linear, basis, k, product)
            weights.append(layer.weight)
            model.set_submodule(path, layer)
        sparse = {id(weight) for weight in weights}
        others = [p for p in _trained(model) if id(p) not in sparse]
        optimizers = [torch.optim.SparseAdam(weights, lr=_LR), *_adamw(others)]
        return Ready(model, optimizers, "three linears, torch.topk, torch.optim.SparseAdam")

    return prepare


METHODS: dict[str, Prepare] = {
    "regular FT": _regular,
    "LoRA": _lora,
    "MeProp": _meprop,
    "paper SparseGrad, regular": _paper(regular),
    "paper SparseGrad, sparse-by-dense": _paper(sparse_by_dense),
    "SparseGrad": _sparsegrad(),
    "SparseGrad, bfloat16 delta": _sparsegrad(delta_dtype=torch.bfloat16),
    "SparseGrad, smaller modes": _sparsegrad(None, "smaller"),
    "SparseGrad, smaller modes, bfloat16 delta": _sparsegrad(None, "smaller", torch.bfloat16),
    "SparseGrad, smaller modes, beta1 0": _sparsegrad(None, "smaller", beta1=0.0),
    "SparseGrad, smaller modes, bfloat16 delta, beta1 0": _sparsegrad(
        None, "smaller", torch.bfloat16, 0.0
    ),
    "SparseGrad, smaller modes, energy .95": _sparsegrad(0.95, "smaller"),
    "SparseGrad, energy .99": _sparsegrad(0.99),
    "SparseGrad, energy .95": _sparsegrad(0.95),
    "SparseGrad, energy .95, bfloat16 delta": _sparsegrad(0.95, "both", torch.bfloat16),
    "SparseGrad, energy .9": _sparsegrad(0.9),
}
