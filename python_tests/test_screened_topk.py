"""`grad_weight_topk` of products large enough for the C++ kernel to screen them in bfloat16.

On a CPU without bfloat16 products, and with other kernels, the same holds by other means.
"""

from __future__ import annotations

import pytest
import torch

from cases import oracle_topk, strided_views
from sparsegrad_kernels.ops import grad_weight_topk

T, OUT, IN = 520, 2600, 610  # two blocks of what is screened; half of the outputs is one
K = OUT * IN // 100


def check(g: torch.Tensor, x: torch.Tensor, k: int = K) -> None:
    """None that was left out is larger than one that was kept, beyond rounding in float32."""
    oracle = g.double().T @ x.double()
    slack = 2e-5 * (g.double().abs().T @ x.double().abs()) + 1e-300
    indices, values = grad_weight_topk(g, x, k)
    at = (indices[0], indices[1])
    linear = indices[0] * IN + indices[1]
    assert (linear[1:] > linear[:-1]).all()
    assert ((values.double() - oracle[at]).abs() <= slack[at]).all()
    left_out = oracle.abs() - slack
    left_out[at] = -1
    assert (oracle.abs() + slack)[at].min() >= left_out.max()


def decaying(n: int, m: int, power: float, generator) -> torch.Tensor:
    return torch.randn(n, m, generator=generator) * torch.arange(1.0, m + 1) ** -power


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-19, 1e-30, 1e12])
def test_random(scale, generator):
    check(torch.randn(T, OUT, generator=generator) * scale, torch.randn(T, IN, generator=generator))


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_energy_in_few_rows_and_columns(power, generator):
    check(decaying(T, OUT, power, generator), decaying(T, IN, power, generator))


def test_layouts_and_zero_tokens(generator):
    g = torch.randn(T + 90, OUT, generator=generator)
    g[torch.randperm(T + 90, generator=generator)[:80]] = 0
    g[:, 17] = 0
    x = torch.randn(T + 90, IN, generator=generator)
    wanted = grad_weight_topk(g, x, K)
    for left, right in zip(strided_views(g).values(), strided_views(x).values(), strict=True):
        got = grad_weight_topk(left, right, K)
        assert torch.equal(got[0], wanted[0])
        torch.testing.assert_close(got[1], wanted[1])
    check(g, x)


def test_exact_where_sums_are_exact(generator):
    """Whole numbers: ties included, every bit is known. Some columns are large: few candidates."""
    g = torch.randint(-8, 9, (T, OUT), generator=generator).float()
    x = torch.randint(-8, 9, (T, IN), generator=generator).float()
    g[:, ::9] *= 32
    x[:, ::11] *= 32
    indices, values = grad_weight_topk(g, x, K)
    wanted_indices, wanted_values = oracle_topk(g.double().T @ x.double(), K)
    assert torch.equal(indices, wanted_indices)
    assert torch.equal(values.double(), wanted_values)


def test_all_equal_magnitudes():
    g, x = torch.ones(T, OUT), torch.ones(T, IN)
    indices, values = grad_weight_topk(g, x, K)
    assert torch.equal(indices[0] * IN + indices[1], torch.arange(K))
    assert (values == T).all()


def test_rounding_errors_that_agree(generator):
    """1 + 2^-8 is halfway between two bfloat16: each rounds away from it in the same direction."""
    g = torch.full((T, OUT), 1 + 2.0**-8)
    g[:, ::2] = 1 + 2.0**-8 + 2.0**-20
    x = torch.full((T, IN), 1.0)
    x[:, ::3] = 1 + 2.0**-9
    check(g + 1e-6 * torch.rand(T, OUT, generator=generator), x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38, 1e-42])
def test_special_values(value, generator):
    g, x = torch.randn(T, OUT, generator=generator), torch.randn(T, IN, generator=generator)
    g[5, 7] = value
    if value == 1e-42:
        g *= 1e-38
    indices, values = grad_weight_topk(g, x, K)
    wanted_indices, wanted_values = oracle_topk(g.T @ x, K)
    if value in (torch.nan, torch.inf):  # all of row 7, and these come first
        row = indices[0] == 7
        assert row.sum() == IN
        assert not values[row].isfinite().any()
        assert values[~row].isfinite().all()
    else:
        smallest, wanted = values.abs().min(), wanted_values.abs().min()
        torch.testing.assert_close(smallest, wanted, rtol=1e-4, atol=1e-44)
        linear, wanted_linear = (i[0] * IN + i[1] for i in (indices, wanted_indices))
        assert torch.isin(linear, wanted_linear).sum() >= K - K // 50


def test_large_product_with_many_rows_of_zeros(generator):
    g = torch.zeros(T, 40 * OUT)
    g[:, : OUT // 2] = torch.randn(T, OUT // 2, generator=generator)
    x = torch.randn(T, 2 * IN, generator=generator)
    indices, values = grad_weight_topk(g, x, 5000)
    assert indices[0].max() < OUT // 2
    wanted = (g[:, : OUT // 2].T @ x).abs().flatten().topk(5000).values
    torch.testing.assert_close(values.abs().sort(descending=True).values, wanted)
    # More than there are: zeros fill up, by the lowest indices.
    indices, values = grad_weight_topk(g[:, OUT // 2 - 3 :], x, 3 * 2 * IN + 100)
    assert (values == 0).sum() == 100
