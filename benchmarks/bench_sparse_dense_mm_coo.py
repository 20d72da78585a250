"""Eq. 2, the compacted product as COO: the dense product of the rows that hold anything."""

from __future__ import annotations

import pytest
import torch
from comparison import Comparison
from shapes import Case, make_inputs

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.sparse_dense_mm_coo import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    from cases import assert_close_to

    inputs = make_inputs(case, device, generator)
    a, b, packed = inputs.g, inputs.w, inputs.g[inputs.rows]  # [T, out] [out, in] [R, out]
    oracle = packed.double() @ b.double()
    scale = oracle.abs().amax()
    expected_rows = inputs.rows.repeat_interleave(b.shape[1])

    def matmul_to_sparse():
        return (a @ b).to_sparse()

    def check(name: str, result) -> None:
        if name in ("ours", "reference"):
            indices, values = result
            assert torch.equal(indices[0], expected_rows)
            assert_close_to(values.view_as(oracle), oracle, scale)
        elif name == "matmul + to_sparse":
            assert_close_to(result.to_dense()[inputs.rows], oracle, scale)
        else:
            assert_close_to(result[inputs.rows] if len(result) == len(a) else result, oracle, scale)

    runs = {
        "ours": lambda: ops.sparse_dense_mm_coo(a, b),
        "reference": lambda: _reference(a, b, 0.0),
        "dense matmul": lambda: a @ b,
        "matmul + to_sparse": matmul_to_sparse,
        "bound": lambda: packed @ b,
    }
    n_bytes = (a.numel() + b.numel() + oracle.numel()) * a.element_size() + 16 * oracle.numel()
    return Comparison(runs, check, n_bytes, flops=2 * packed.numel() * b.shape[1])


@pytest.mark.contenders("dense matmul", "matmul + to_sparse", "bound", varies=("fraction",))
def test_sparse_dense_mm_coo(race) -> None:
    race(compare)
