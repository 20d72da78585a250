"""Lazy Adam on k entries: indices, gradient, and the parameter and its moments twice (44 bytes an
entry in float32) have to be moved. There is no run for this bound: it is bytes over bandwidth.
"""

from __future__ import annotations

import pytest
import torch
from comparison import Comparison
from shapes import Case, make_inputs
from torch import Tensor

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.sparse_adam_ import _reference

_LR, _BETA1, _BETA2, _EPS = 1e-6, 0.9, 0.999, 1e-8


def _new_state(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    from cases import assert_close_to

    weight = make_inputs(case, device, generator).w
    indices, values = ops.topk_coo(weight, case.k)
    hyper = (1, _LR, _BETA1, _BETA2, _EPS)
    states = {name: _new_state(weight) for name in ("ours", "reference")}
    expected = tuple(tensor.double() for tensor in _new_state(weight))
    _reference(*expected, indices, values.double(), *hyper)

    sparse, dense = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    sparse.grad = torch.sparse_coo_tensor(
        indices, values, weight.shape, is_coalesced=True, check_invariants=False
    )
    dense.grad = weight.clone()
    sparse_adam = torch.optim.SparseAdam([sparse], lr=_LR, eps=_EPS)

    def check(name: str, result) -> None:
        if name in states:
            for got, wanted in zip(states[name], expected, strict=True):
                assert_close_to(got, wanted, wanted.abs().amax())
        elif name == "torch.optim.SparseAdam":
            assert_close_to(sparse.detach(), expected[0], expected[0].abs().amax())

    runs = {
        "ours": lambda: ops.sparse_adam_(*states["ours"], indices, values, *hyper),
        "reference": lambda: _reference(*states["reference"], indices, values, *hyper),
        "torch.optim.SparseAdam": sparse_adam.step,
        "fused dense AdamW": torch.optim.AdamW([dense], lr=_LR, fused=True).step,
    }
    return Comparison(runs, check, n_bytes=case.k * (16 + 7 * weight.element_size()))


@pytest.mark.contenders("torch.optim.SparseAdam", "fused dense AdamW", varies=("density",))
def test_sparse_adam_(race) -> None:
    race(compare)
