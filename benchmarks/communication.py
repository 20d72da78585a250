"""What data-parallel training would send each step, on paper: bytes per rank, from shapes.

    python benchmarks/communication.py

Nothing here is measured. Assumed: float32 gradients; a ring all-reduce, of which each rank sends
and receives `2 (n - 1) / n` of the tensor; an all-gather, of which it receives what the `n - 1`
others hold, as `sync_sparse_gradients` does. Time is bytes over the bandwidth below, without
latency and without overlap with the backward pass.

Each rank keeps the k largest entries of its own gradient, so the sets differ and have to be
gathered: that grows with the ranks, and beyond `1 / density` of them (100 at 1%) costs more than
reducing the dense gradient. Truncated, the gradient is a small dense matrix, which is reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RANKS = (8, 64, 1024)
_VALUE, _INDEX = 4, 4  # bytes: float32, and a linear index
# Bytes a second, each way, per GPU: NVLink 4 in one node; 400 Gb/s InfiniBand NDR between nodes.
_NVLINK, _INFINIBAND = 450e9, 50e9


def bandwidth(ranks: int) -> float:
    return _NVLINK if ranks <= 8 else _INFINIBAND


@dataclass(frozen=True)
class Setting:
    """The MLP linears that a model trains, and the methods' sizes (paper sections 5.1 and 5.2)."""

    name: str
    in_features: int
    out_features: int
    n_linears: int
    density: float
    lora_rank: int

    @property
    def weights(self) -> int:
        return self.n_linears * self.in_features * self.out_features


SETTINGS = (
    Setting("bert-base", 768, 3072, 24, 0.01, 7),
    Setting("roberta-large", 1024, 4096, 48, 0.01, 10),
    Setting("llama-7b, every third block", 4096, 11008, 22, 0.002, 32),
)


def all_reduce(numbers: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * numbers * _VALUE


def all_gather(entries: float, ranks: int) -> float:
    return (ranks - 1) * entries * (_VALUE + _INDEX)


METHODS: dict[str, Callable[[Setting, int], float]] = {
    "regular FT": lambda s, n: all_reduce(s.weights, n),
    "LoRA": lambda s, n: all_reduce(
        s.n_linears * s.lora_rank * (s.in_features + s.out_features), n
    ),
    "SparseGrad, MeProp: COO gathered": lambda s, n: all_gather(s.density * s.weights, n),
    # The shares of design section 2.3's example, 919x196 of 3072x768: energy about .9.
    "SparseGrad, basis 30% x 26%, reduced": lambda s, n: all_reduce(0.30 * 0.255 * s.weights, n),
}


def table() -> list[dict[str, object]]:
    return [
        {
            "model": setting.name,
            "ranks": ranks,
            "method": method,
            "bytes": volume(setting, ranks),
            "seconds": volume(setting, ranks) / bandwidth(ranks),
        }
        for setting in SETTINGS
        for ranks in RANKS
        for method, volume in METHODS.items()
    ]


def main() -> None:
    print("| model | ranks | method | MB per rank and step | ms |\n|---|---|---|---|---|")
    for row in table():
        print(
            f"| {row['model']} | {row['ranks']} | {row['method']} | "
            f"{row['bytes'] / 1e6:.1f} | {1e3 * row['seconds']:.2f} |"
        )


if __name__ == "__main__":
    main()
