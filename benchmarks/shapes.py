"""What the kernels are timed on: shapes, dtypes, shares of nonzero tokens, densities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A linear layer and how many tokens go through it."""

    name: str
    in_features: int
    out_features: int
    tokens: int


SHAPES = (
    Shape("bert-base", 768, 3072, 2048),
    Shape("roberta-large", 1024, 4096, 2048),
    Shape("llama-7b", 4096, 11008, 2048),
    # No multiples of anything: odd, with more tokens than usual, thin.
    Shape("odd", 385, 1537, 333),
    Shape("odd-long", 127, 509, 9973),
    Shape("odd-thin", 4099, 37, 1021),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
DENSITIES = (0.002, 0.01, 0.04)


@dataclass(frozen=True)
class Case:
    shape: Shape = SHAPES[0]
    dtype: torch.dtype = torch.float32
    fraction: float = 0.5  #: share of the tokens that have a gradient
    density: float = 0.01

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.name}-{dtype}-rows{self.fraction:g}-density{self.density:g}"

    @property
    def k(self) -> int:
        return max(1, round(self.density * self.shape.in_features * self.shape.out_features))


def cases(full: bool, on_gpu: bool, varies: tuple[str, ...]) -> list[Case]:
    """Quick: one shape of the paper and one odd one. Full: one axis at a time away from there.

    `varies` says which of "fraction" and "density" the operator depends on.
    """
    return list(dict.fromkeys(_all_cases(full, on_gpu, varies)))


def _all_cases(full: bool, on_gpu: bool, varies: tuple[str, ...]) -> Iterator[Case]:
    centre, odd = Case(), Case(SHAPES[3])
    if not full:
        yield from (centre, odd, replace(odd, dtype=torch.bfloat16))
        if on_gpu:
            yield from (replace(centre, dtype=torch.bfloat16), Case(SHAPES[2], torch.bfloat16))
        if "fraction" in varies:
            yield replace(centre, fraction=0.1)
        if "density" in varies:
            yield replace(centre, density=0.04)
        return
    for shape in SHAPES:
        for dtype in DTYPES:
            if on_gpu or _is_bearable(shape, dtype):
                yield Case(shape, dtype)
    for shape in SHAPES[:3]:
        if "fraction" in varies:
            yield from (Case(shape, fraction=fraction) for fraction in FRACTIONS)
        if "density" in varies:
            yield from (Case(shape, density=density) for density in DENSITIES)


def _is_bearable(shape: Shape, dtype: torch.dtype) -> bool:
    """On a CPU: some multiply 16 bits at a hundredth of float32's rate, which takes hours."""
    if shape.name.startswith("odd"):
        return True
    is_wide = dtype in (torch.float32, torch.float64)
    return is_wide and (shape.name != "llama-7b" or dtype == torch.float32)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case: `g [T, out]` with its zero tokens, `x [T, in]`, `w [out, in]`."""

    g: Tensor
    x: Tensor
    w: Tensor
    rows: Tensor  #: the tokens with a gradient


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    shape = case.shape

    def random(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator).to(device, case.dtype)

    n_rows = max(1, round(case.fraction * shape.tokens))
    rows = torch.randperm(shape.tokens, generator=generator)[:n_rows].sort().values.to(device)
    g = torch.zeros(shape.tokens, shape.out_features, dtype=case.dtype, device=device)
    g[rows] = random(n_rows, shape.out_features)
    return Inputs(
        g,
        random(shape.tokens, shape.in_features),
        random(shape.out_features, shape.in_features),
        rows,
    )
