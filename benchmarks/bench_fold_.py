"""The fold `W += V^T D~ U`: the dense product of its cheaper order is the least.

With a basis of the smaller side alone there is no dense product; a copy of the weight is the least.
"""

from __future__ import annotations

import pytest
import torch
from comparison import Comparison
from shapes import Case, make_inputs
from torch import Tensor

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops.fold_ import _reference


def compare(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    from cases import assert_close_to

    weight = make_inputs(case, device, generator).w
    out_features, in_features = weight.shape

    def factor(n: int) -> Tensor:  # of an orthogonal matrix's size, without the cost of making one
        return (torch.randn(n, n, generator=generator) / n**0.5).to(device, case.dtype)

    u, v = factor(in_features), factor(out_features)
    indices, values = ops.topk_coo(weight, case.k)
    delta = torch.zeros_like(weight)
    delta[indices[0], indices[1]] = values
    u_first = out_features < in_features  # V^T (D~ U), whose dense product is the smaller one
    half = delta @ u if u_first else v.T @ delta
    oracle = weight.double() + v.double().T @ (delta.double() @ u.double())
    scale = oracle.abs().amax()
    # Each contender its own weight, checked after its first run.
    weights = {
        name: weight.clone() for name in ("ours", "reference", "dense products", "torch.sparse.mm")
    }

    def dense_products() -> None:
        product = v.T @ (delta @ u) if u_first else (v.T @ delta) @ u
        weights["dense products"].add_(product)

    def sparse_mm() -> None:
        d = torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=False)
        if u_first:
            weights["torch.sparse.mm"].addmm_(v.T, torch.sparse.mm(d, u))
        else:
            weights["torch.sparse.mm"].addmm_(torch.sparse.mm(d.t(), v).T, u)

    def check(name: str, result) -> None:
        if name in weights:
            # Every product before the last is rounded to the dtype too.
            assert_close_to(weights[name], oracle, 4 * scale)

    runs = {
        "ours": lambda: ops.fold_(weights["ours"], u, v, indices, values),
        "reference": lambda: _reference(weights["reference"], u, v, indices, values),
        "dense products": dense_products,
        "torch.sparse.mm": sparse_mm,
        "bound": lambda: (v.T @ half) if u_first else (half @ u),
    }
    smaller, larger = sorted((in_features, out_features))
    return Comparison(
        runs,
        check,
        n_bytes=(2 * weight.numel() + u.numel() + v.numel()) * weight.element_size(),
        flops=2 * (case.k * larger + smaller * smaller * larger),
    )


@pytest.mark.contenders("dense products", "torch.sparse.mm", "bound", varies=("density",))
def test_fold_(race) -> None:
    race(compare)


def compare_one_basis(case: Case, device: torch.device, generator: torch.Generator) -> Comparison:
    from cases import assert_close_to

    weight = make_inputs(case, device, generator).w
    out_features, in_features = weight.shape
    of_input = in_features <= out_features
    size = min(in_features, out_features)
    basis = (torch.randn(size, size, generator=generator) / size**0.5).to(device, case.dtype)
    u, v = (basis, None) if of_input else (None, basis)
    indices, values = ops.topk_coo(weight, case.k)
    delta = torch.zeros_like(weight)
    delta[indices[0], indices[1]] = values
    wide = delta.double() @ basis.double() if of_input else basis.double().T @ delta.double()
    oracle = weight.double() + wide
    scale = oracle.abs().amax()
    weights = {
        name: weight.clone() for name in ("ours", "reference", "dense product", "torch.sparse.mm")
    }

    def dense_product() -> None:
        if of_input:
            weights["dense product"].addmm_(delta, basis)
        else:
            weights["dense product"].addmm_(basis.T, delta)

    def sparse_mm() -> None:
        d = torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=False)
        added = torch.sparse.mm(d, basis) if of_input else torch.sparse.mm(d.t(), basis).T
        weights["torch.sparse.mm"].add_(added)

    def check(name: str, result) -> None:
        if name in weights:
            assert_close_to(weights[name], oracle, 4 * scale)

    runs = {
        "ours": lambda: ops.fold_(weights["ours"], u, v, indices, values),
        "reference": lambda: _reference(weights["reference"], u, v, indices, values),
        "dense product": dense_product,
        "torch.sparse.mm": sparse_mm,
        "bound": lambda: delta.copy_(weight),
    }
    return Comparison(
        runs,
        check,
        n_bytes=(2 * weight.numel() + basis.numel()) * weight.element_size(),
        flops=2 * case.k * size,
    )


@pytest.mark.contenders(
    "dense product", "torch.sparse.mm", "bound", varies=("density",), op="fold_"
)
def test_fold_one_basis(race) -> None:
    race(compare_one_basis)
