"""Eq. 1, the compacted product: the dense product of the rows that hold anything is the least."""

from __future__ import annotations

import peers
import pytest
import torch
from comparison import Comparison
from shapes import Case, make_inputs

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.sparse_dense_mm import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    from cases import assert_close_to

    inputs = make_inputs(case, device, generator)
    a, b, packed = inputs.g, inputs.w, inputs.g[inputs.rows]  # [T, out] [out, in] [R, out]
    oracle = a.double() @ b.double()
    scale = oracle.abs().amax()

    def check(name: str, result) -> None:
        wanted = oracle[inputs.rows] if name == "bound" else oracle
        assert_close_to(result, wanted, scale)

    runs = {
        "ours": lambda: ops.sparse_dense_mm(a, b),
        "reference": lambda: _reference(a, b, 0.0),
        "dense matmul": lambda: a @ b,
        "index_select + matmul": lambda: peers.select_matmul(a, b),
        "torch.sparse.mm": lambda: torch.sparse.mm(a.to_sparse_csr(), b),
        "bound": lambda: packed @ b,
    }
    n_bytes = (a.numel() + b.numel() + oracle.numel()) * a.element_size()
    return Comparison(runs, check, n_bytes, flops=2 * packed.numel() * b.shape[1])


@pytest.mark.contenders(
    "dense matmul", "index_select + matmul", "torch.sparse.mm", "bound", varies=("fraction",)
)
def test_sparse_dense_mm(race) -> None:
    race(compare)
