"""The paper's figures that its scanned text gives legibly and without contradiction.

Left out: Table 3's 11345 MB for regular fine-tuning (Table 8 has 1345, which fits the 30% that the
text says LoRA saves); the columns of Table 7 by task, which are cut off and contradict its averages
(12.9 steps/s for regular fine-tuning on STS-B where the average is 4.1); the columns of Table 8
after CoLA, which are cut off too.
"""

from __future__ import annotations

MODEL = "roberta-base"
SOURCE = "RoBERTa-base on GLUE; Tables 3 and 7 (average), Table 8; the card is not stated"

# Ours, by the names in `training_methods.METHODS`.
STEPS_PER_SECOND = {  # Table 7, AVG
    "regular FT": 4.1,
    "LoRA": 4.7,
    "paper SparseGrad, sparse-by-dense": 4.3,
    "paper SparseGrad, regular": 0.9,
}
PEAK_MB = {  # Table 8
    "AVG": {
        "regular FT": 1345,
        "LoRA": 944,
        "paper SparseGrad, sparse-by-dense": 1016,
        "paper SparseGrad, regular": 1210,
    },
    "stsb": {
        "regular FT": 1344,
        "LoRA": 969,
        "paper SparseGrad, sparse-by-dense": 997,
        "paper SparseGrad, regular": 1283,
    },
    "cola": {
        "regular FT": 1358,
        "LoRA": 978,
        "paper SparseGrad, sparse-by-dense": 1082,
        "paper SparseGrad, regular": 1212,
    },
}
# What this package's own rows are set beside: the paper's better variant.
SAME_METHOD = {"SparseGrad": "paper SparseGrad, sparse-by-dense"}


def paper_ratio(values: dict[str, float], method: str) -> float | None:
    """To regular fine-tuning."""
    value = values.get(SAME_METHOD.get(method, method))
    return None if value is None else value / values["regular FT"]
