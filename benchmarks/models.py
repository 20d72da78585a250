"""The models that training is timed on: transformers' architectures, random weights; and MiniLM.

Time and memory do not depend on the weights' values, but for one thing: how far `energy` truncates
a basis depends on the gradient's spectrum, and a random network's is not a trained one's.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsegrad_kernels import SparseGradConfig

MODELS = ("minilm", "bert-base", "roberta-base", "roberta-large", "llama-7b-block")
DENSITY = {"llama-7b-block": 0.002}  # the paper's; 0.01 for the others
LORA_RANK = {"roberta-large": 10, "llama-7b-block": 32}  # the paper's; 7 for the others
_SMALL_VOCABULARY = 1000  # of the LLaMA block: its embeddings are frozen and of no interest


def vocabulary_of(name: str) -> int:
    return _SMALL_VOCABULARY if name == "llama-7b-block" else 30000


def sparsegrad_config(name: str, energy: float | None = None) -> SparseGradConfig:
    return SparseGradConfig(density=DENSITY.get(name, 0.01), energy=energy)


def build_model(name: str, n_labels: int, n_layers: int | None = None) -> nn.Module:
    """On the CPU, in float32; `n_layers` where not all (the LLaMA block: 1 by default)."""
    import transformers

    torch.manual_seed(0)
    if name == "minilm":
        from sparsegrad_kernels.finetune.pretrained import find_pretrained

        path = find_pretrained(None).path
        if n_layers is None:
            n_layers = transformers.AutoConfig.from_pretrained(path).num_hidden_layers
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=n_labels, num_hidden_layers=n_layers
        )
    if name == "llama-7b-block":
        config = transformers.LlamaConfig(
            vocab_size=_SMALL_VOCABULARY, num_hidden_layers=n_layers or 1, use_cache=False
        )
        return transformers.LlamaForCausalLM(config)
    if name == "bert-base":
        config = transformers.BertConfig(num_labels=n_labels)
        kind = transformers.BertForSequenceClassification
    else:
        large = name == "roberta-large"
        config = transformers.RobertaConfig(
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_size=1024 if large else 768,
            intermediate_size=4096 if large else 3072,
            num_hidden_layers=24 if large else 12,
            num_attention_heads=16 if large else 12,
            num_labels=n_labels,
        )
        kind = transformers.RobertaForSequenceClassification
    if n_layers is not None:
        config.num_hidden_layers = n_layers
    return kind(config)
