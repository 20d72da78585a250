"""Row and column detection: one read of `a` is the least there is to do."""

from __future__ import annotations

import peers
import pytest
import torch
from comparison import Comparison
from measure import read_once
from shapes import Case, make_inputs

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.nonzero_rows_cols import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    inputs = make_inputs(case, device, generator)
    g, columns = inputs.g, torch.arange(case.shape.out_features, device=device)

    def check(name: str, result) -> None:
        if name != "bound":
            assert torch.equal(result[0], inputs.rows)
            assert torch.equal(result[1], columns)

    runs = {
        "ours": lambda: ops.nonzero_rows_cols(g),
        "reference": lambda: _reference(g, 0.0),
        "any + nonzero": lambda: peers.any_nonzero(g),
        "two nonzero": lambda: peers.two_nonzero(g),
        "bound": lambda: read_once(g),
    }
    return Comparison(runs, check, n_bytes=g.numel() * g.element_size())


@pytest.mark.contenders("any + nonzero", "two nonzero", "bound", varies=("fraction",))
def test_nonzero_rows_cols(race) -> None:
    race(compare)
