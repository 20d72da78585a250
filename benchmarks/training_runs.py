"""Training runs of each method on one model and task: memory, then time, in turns."""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import glue
import models
import torch
from measure import Run, captured
from torch import Tensor, nn
from training_methods import METHODS, Bases, Ready

from sparsegrad_kernels import fit_basis
from sparsegrad_kernels.finetune.memory import WATCHED_STEPS, PeakMemory, live_tensor_bytes
from sparsegrad_kernels.finetune.train import autocast, to_device

_PADDED_TO = 128
_PACKED_LENGTH = 512
_WARM_UP = 2
PARTS = ("forward", "backward", "step")


@dataclass
class Row:
    """One method on one model and task; `seconds` are the medians of a step and its parts."""

    model: str
    task: str
    method: str
    status: str = "not run"
    about: str = ""
    batch: int = 0
    tokens: int = 0
    nonzero_tokens: int = 0
    trained_numbers: int = 0
    steps_per_second: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


class _Marks:
    """Moments of a step on the device: events on CUDA, else the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        if not self.on_gpu:
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append(event)

    def parts(self) -> list[float]:
        """Seconds between each two moments."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if not self.on_gpu:
            return [after - before for before, after in pairs]
        self.moments[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


class TrainingBench:
    """One model and task: its batches, its bases, and the turns of each method."""

    def __init__(self, name: str, task: str, options: argparse.Namespace) -> None:
        self.name, self.task, self.options = name, task, options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        packed = name == "llama-7b-block"
        n_labels = 2 if packed else glue.TASKS[task].n_labels
        self.base = models.build_model(name, n_labels, options.layers)
        self.graph: Run | None = None
        generator = torch.Generator().manual_seed(0)
        size = options.batch_size or glue.batch_size(name, task)
        vocabulary = models.vocabulary_of(name)
        self.batches = [
            glue.packed_batch(size, _PACKED_LENGTH, vocabulary, generator)
            if packed
            else glue.classification_batch(
                glue.TASKS[task], size, _PADDED_TO, vocabulary, generator
            )
            for _ in range(4)
        ]

    def row(self, method: str) -> Row:
        masks = [batch["attention_mask"] for batch in self.batches]
        return Row(
            self.name,
            self.task,
            method,
            batch=masks[0].shape[0],
            tokens=masks[0].numel(),
            nonzero_tokens=round(statistics.mean(int(mask.sum()) for mask in masks)),
        )

    def loss(self, model: nn.Module, step: int) -> Tensor:
        with autocast(self.device, self.dtype):
            return model(**to_device(self.batches[step % len(self.batches)], self.device)).loss

    def fit_bases(self) -> Bases:
        """On the device, and kept on the CPU until a method takes its copy."""
        model = copy.deepcopy(self.base).to(self.device)
        bases = fit_basis(
            model,
            range(self.options.basis_steps),
            models.sparsegrad_config(self.name),
            n_steps=self.options.basis_steps,
            loss_fn=self.loss,
            progress=False,
        )
        return {group: basis.to("cpu") for group, basis in bases.items()}

    def prepare(self, method: str, bases: Bases) -> Ready:
        model = copy.deepcopy(self.base).to(self.device).train()
        return METHODS[method](model, self.name, bases)

    def replay(self, ready: Ready, number: int) -> list[float]:
        """A step of the graph of `capture`, which can be timed as a whole only."""
        assert self.graph is not None
        marks = _Marks(self.device)
        marks.mark()
        for name, tensor in self.batches[number % len(self.batches)].items():
            self.static[name].copy_(tensor)
        self.graph()
        marks.mark()
        return marks.parts()

    def capture(self, ready: Ready) -> None:
        """Forward, backward and the optimizer's step as one CUDA graph, on tensors of its own."""
        self.static = {k: t.to(self.device, copy=True) for k, t in self.batches[0].items()}

        def run() -> None:
            with autocast(self.device, self.dtype):
                loss = ready.model(**self.static).loss
            loss.backward()
            for optimizer in ready.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        for optimizer in ready.optimizers:
            for group in optimizer.param_groups:
                group["capturable"] = True
        self.graph = captured(run)

    def step(self, ready: Ready, number: int) -> list[float]:
        marks = _Marks(self.device)
        marks.mark()
        loss = self.loss(ready.model, number)
        marks.mark()
        loss.backward()
        marks.mark()
        for optimizer in ready.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        marks.mark()
        return marks.parts()

    def measure_memory(self, row: Row, bases: Bases) -> None:
        idle = live_tensor_bytes() if self.device.type == "cpu" else 0
        memory = PeakMemory(self.device)
        ready = self.prepare(row.method, bases)
        row.about = ready.about
        row.trained_numbers = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
        for number in range(max(WATCHED_STEPS) + 1):
            with memory.watch(number):
                self.step(ready, number)
        if memory.peak_bytes is not None:
            row.peak_bytes = memory.peak_bytes - idle

    def measure_time(self, row: Row, bases: Bases) -> list[list[float]]:
        ready = self.prepare(row.method, bases)
        step = self.step
        if self.options.graph:
            self.capture(ready)
            step = self.replay
        steps = [step(ready, n) for n in range(_WARM_UP + self.options.steps)]
        self.graph = None
        return steps[_WARM_UP:]

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("DefaultCPUAllocator", "bad_alloc", "could not create a memory")  # torch, C++, oneDNN
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def run(bench: TrainingBench, methods: list[str], turns: int) -> list[Row]:
    """All methods on one model and task; a method that runs out of memory takes no further turn."""
    rows = {method: bench.row(method) for method in methods}
    samples: dict[str, list[list[float]]] = {method: [] for method in methods}
    try:
        bases = bench.fit_bases()
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        bases = {}
    for turn in range(turns + 1):
        for method, row in rows.items():
            if row.status == "out of memory":
                continue
            needs_bases = "SparseGrad" in method
            try:
                if needs_bases and not bases:
                    raise MemoryError("the bases did not fit")
                if turn == 0:
                    bench.measure_memory(row, bases)
                else:
                    samples[method] += bench.measure_time(row, bases)
                row.status = "measured"
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                row.status, row.peak_bytes = "out of memory", None
            bench.release()
    for method, row in rows.items():
        if row.status == "measured":
            parts = () if bench.options.graph else PARTS
            row.seconds = {
                part: statistics.median(times)
                for part, times in zip(parts, zip(*samples[method], strict=True), strict=False)
            }
            row.seconds["all"] = statistics.median(sum(parts) for parts in samples[method])
            row.steps_per_second = 1 / row.seconds["all"]
    return list(rows.values())
