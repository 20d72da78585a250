"""Top-k to COO: one read of `c` is the least; two passes read it twice."""

from __future__ import annotations

import peers
import pytest
import torch
from comparison import Comparison
from measure import read_once
from shapes import Case, make_inputs

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.topk_coo import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    c, k = make_inputs(case, device, generator).w, case.k
    # A stable sort keeps the lowest index first among equals, which half precision has many of.
    order = c.flatten().abs().sort(descending=True, stable=True).indices[:k]
    linear = order.sort().values
    expected = torch.stack([linear // c.shape[1], linear % c.shape[1]])
    magnitudes = c.flatten()[order].abs()

    def check(name: str, result) -> None:
        if name == "bound":
            return
        indices, values = result
        if name in ("ours", "reference"):
            assert torch.equal(indices, expected)
        assert torch.equal(values, c[indices[0], indices[1]])
        assert torch.equal(values.abs().sort(descending=True).values, magnitudes)

    runs = {
        "ours": lambda: ops.topk_coo(c, k),
        "reference": lambda: _reference(c, k),
        "abs().topk + sort": lambda: peers.torch_topk(c, k),
        "numpy.argpartition": lambda: peers.numpy_argpartition(c, k),
        "bound": lambda: read_once(c),
    }
    written = k * (16 + c.element_size())
    return Comparison(runs, check, n_bytes=c.numel() * c.element_size() + written)


@pytest.mark.contenders("abs().topk + sort", "numpy.argpartition", "bound", varies=("density",))
def test_topk_coo(race) -> None:
    race(compare)
