"""Tiny transformers with random weights, one per architecture that the package knows."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY = 40


def tiny(model_type: str, layers: int = 2) -> nn.Module:
    import transformers

    if model_type == "plain":
        return Plain(layers)
    sizes = {"vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if model_type == "distilbert":
        sizes |= {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": layers}
    elif model_type == "gpt2":
        sizes |= {"n_embd": 16, "n_head": 2, "n_layer": layers, "n_inner": 32}
    else:
        sizes |= {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": layers,
        }
    if model_type in ("llama", "mistral", "qwen2"):
        sizes |= {"num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def token_batches(n: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
    batches = []
    for _ in range(n):
        ids = torch.randint(1, VOCABULARY, (4, 9), generator=generator)
        mask = torch.arange(9) < torch.randint(3, 10, (4, 1), generator=generator)
        labels = torch.randint(3, (4,), generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels})
    return batches


class Plain(nn.Module):
    """No transformer: residual MLPs, and a scalar loss as output."""

    def __init__(self, layers: int = 2, hidden: int = 8, wide: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(hidden, wide), "down": nn.Linear(wide, hidden)})
            for _ in range(layers)
        )
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](self.dropout(torch.relu(block["up"](x))))
        return self.head(self.norm(x)).square().mean()
