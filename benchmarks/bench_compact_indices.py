"""Row and column detection without a host sync: one read of `a`."""

from __future__ import annotations

import peers
import pytest
import torch
from comparison import Comparison
from measure import read_once
from shapes import Case, make_inputs

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.compact_indices import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    inputs = make_inputs(case, device, generator)
    g, n_rows = inputs.g, inputs.rows.shape[0]

    def check(name: str, result) -> None:
        if name != "bound":
            rows, cols, counts = result
            assert counts.tolist() == [n_rows, case.shape.out_features]
            assert torch.equal(rows[:n_rows].long(), inputs.rows)
            assert bool((rows[n_rows:] == -1).all())
            assert torch.equal(cols.long(), torch.arange(case.shape.out_features, device=device))

    runs = {
        "ours": lambda: ops.compact_indices(g),
        "reference": lambda: _reference(g, 0.0),
        "any + nonzero_static": lambda: peers.any_nonzero_static(g),
        "bound": lambda: read_once(g),
    }
    return Comparison(runs, check, n_bytes=g.numel() * g.element_size())


@pytest.mark.contenders("any + nonzero_static", "bound", varies=("fraction",))
def test_compact_indices(race) -> None:
    race(compare)
