"""The k largest entries of `g^T x`: the product of the tokens with a gradient is the least."""

from __future__ import annotations

import peers
import pytest
import torch
from comparison import Comparison
from shapes import Case, make_inputs

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.grad_weight_topk import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    from cases import TOLERANCE, assert_close_to

    inputs = make_inputs(case, device, generator)
    g, x, k = inputs.g, inputs.x, case.k
    packed, packed_x = g[inputs.rows], x[inputs.rows]  # [R, out] [R, in]
    dense = packed.double().T @ packed_x.double()
    scale = dense.abs().amax()
    smallest_kept = dense.abs().flatten().kthvalue(dense.numel() - k + 1).values

    def check(name: str, result) -> None:
        if name == "bound":
            assert_close_to(result, dense, scale)
            return
        indices, values = result
        assert values.shape == (k,)
        entries = dense[indices[0], indices[1]]
        assert_close_to(values, entries, scale)
        # Rounding may swap entries at the threshold, and none further below it.
        assert bool((entries.abs() >= smallest_kept - 2 * TOLERANCE[case.dtype] * scale).all())

    runs = {
        "ours": lambda: ops.grad_weight_topk(g, x, k),
        "reference": lambda: _reference(g, x, k, 0.0),
        "dense matmul + topk": lambda: peers.torch_topk(g.T @ x, k),
        "index_select + matmul + topk": lambda: peers.select_matmul_topk(g, x, k),
        "bound": lambda: packed.T @ packed_x,
    }
    n_bytes = (g.numel() + packed_x.numel()) * g.element_size() + k * (16 + g.element_size())
    return Comparison(runs, check, n_bytes, flops=2 * packed.numel() * x.shape[1])


@pytest.mark.contenders(
    "dense matmul + topk",
    "index_select + matmul + topk",
    "bound",
    varies=("fraction", "density"),
)
def test_grad_weight_topk(race) -> None:
    race(compare)
