"""The training loop and the evaluation: plain PyTorch, the same for every method."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .memory import PeakMemory


@dataclass
class History:
    """What a run measured; `peak_bytes` is None where it could not be had."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None

    @property
    def steps_per_second(self) -> float:
        return len(self.losses) / self.seconds if self.seconds else math.nan


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for a half `dtype`: parameters and optimizer stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def batch_loss(
    model: nn.Module, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Tensor:
    with autocast(device, dtype):
        return model(**to_device(batch, device)).loss


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    n_steps: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    title: str = "train",
) -> History:
    """`n_steps` steps, learning rate warmed up over a tenth of them and then linearly to zero.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    from transformers import get_linear_schedule_with_warmup

    schedule = get_linear_schedule_with_warmup(optimizer, n_steps // 10, n_steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history, memory = History(), PeakMemory(device)
    model.train()
    with tqdm(total=n_steps, desc=title, unit="step") as bar:
        for step, batch in enumerate(endless(batches)):
            with memory.watch(step):
                start = time.perf_counter()
                loss = batch_loss(model, batch, device, dtype)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                value = float(loss.detach())  # waits for the device
                history.seconds += time.perf_counter() - start
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {step}: try a smaller --lr "
                    f"(it is {optimizer.param_groups[0]['initial_lr']:g})"
                )
            history.losses.append(value)
            bar.set_postfix(loss=f"{value:.4f}")
            bar.update()
            if step + 1 == n_steps:
                break
    history.peak_bytes = memory.peak_bytes
    return history


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, float]:
    """("accuracy", share of right answers), or ("pearson", correlation) for regression."""
    model.eval()
    outputs, targets = [], []
    for batch in tqdm(batches, desc="evaluate", unit="batch"):
        with autocast(device, dtype):
            logits = model(**to_device(batch, device)).logits
        outputs.append(logits.float().cpu())
        targets.append(batch["labels"])
    output, target = torch.cat(outputs), torch.cat(targets)
    if target.is_floating_point():
        return "pearson", float(torch.corrcoef(torch.stack([output.squeeze(1), target]))[0, 1])
    return "accuracy", float((output.argmax(1) == target).float().mean())
