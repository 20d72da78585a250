"""How each method readies a model for training, and what is left of it afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .. import SparseAdam, SparseGradConfig, SparseGradLinear, convert, fit_basis, merge
from ..basis import LossFn
from ..config import find_targets, linear_view

METHODS = ("sparsegrad", "lora", "meprop", "full")
# The best of a search on the tweets, per method; `full` is regular fine-tuning of the same layers.
LEARNING_RATES = {"sparsegrad": 2e-3, "lora": 4e-3, "meprop": 4e-3, "full": 2e-4}


@dataclass
class Prepared:
    """A model to train; `trained_numbers` are those that one step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained_numbers: int
    about: str

    def merged(self) -> nn.Module:
        """The plain model, with what was learnt inside its own weights."""
        merge_adapter = getattr(self.model, "merge_and_unload", None)
        if merge_adapter is not None:
            return cast(nn.Module, merge_adapter())
        if any(isinstance(module, SparseGradLinear) for module in self.model.modules()):
            return merge(self.model)
        return self.model


def prepare(
    method: str,
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: SparseGradConfig,
    lr: float,
    basis_steps: int,
    task_type: str = "SEQ_CLS",
) -> Prepared:
    """Make the MLP linears that `config` selects trainable by `method`, with the head.

    All methods train the biases of these linears and the head as they are, and nothing else. LoRA's
    rank is the one whose numbers come closest to SparseGrad's k entries per linear; `task_type` is
    peft's.
    """
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):  # the head
            parameter.requires_grad_(True)
    for target in targets.values():
        if (bias := getattr(target.module, "bias", None)) is not None:
            bias.requires_grad_(True)
    if method == "full":
        for target in targets.values():
            cast(nn.Parameter, target.module.weight).requires_grad_(True)
        return _prepared(model, lr, f"AdamW on {len(targets)} linears")
    if method == "lora":
        return _lora(model, list(targets), config, lr, task_type)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    basis = None
    if method == "sparsegrad":
        basis = fit_basis(model, batches, config, basis_steps, loss_fn=loss_fn)
    convert(model, basis, config)
    layers = [module for module in model.modules() if isinstance(module, SparseGradLinear)]
    k = sum(layer.k for layer in layers)
    return _prepared(model, lr, f"{k} gradient entries a step in {len(layers)} linears", sparse=k)


def _prepared(model: nn.Module, lr: float, about: str, sparse: int = 0) -> Prepared:
    """With SparseAdam, which is AdamW where gradients are dense."""
    inner = {
        id(layer.delta if layer.delta is not None else layer.weight)
        for layer in model.modules()
        if isinstance(layer, SparseGradLinear)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    dense = sum(p.numel() for p in trained if id(p) not in inner)
    return Prepared(model, SparseAdam(trained, lr=lr), dense + sparse, about)


def _lora(
    model: nn.Module, names: list[str], config: SparseGradConfig, lr: float, task_type: str
) -> Prepared:
    from peft import LoraConfig, TaskType, get_peft_model

    modules = dict(model.named_modules())
    shapes = [linear_view(modules[n], cast(torch.Tensor, modules[n].weight)).shape for n in names]
    entries = sum(config.density * out * in_ for out, in_ in shapes)
    rank = max(1, round(entries / sum(out + in_ for out, in_ in shapes)))
    lora = get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType(task_type),
            r=rank,
            lora_alpha=2 * rank,
            target_modules=names,
            bias="lora_only",
        ),
    )
    return _prepared(lora, lr, f"peft, r={rank}, on {len(names)} linears")
