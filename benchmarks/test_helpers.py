"""What the benchmarks themselves rely on."""

from __future__ import annotations

import communication
import glue
import pytest
import tables
import torch
from paper import PaperLinear, regular, sparse_by_dense
from scaling import crossings
from shapes import Case, cases
from steps import random_basis
from torch import nn

from sparsegrad_kernels import SparseGradLinear


@pytest.mark.parametrize("product", [regular, sparse_by_dense])
def test_paper_layer_computes_what_ours_does(product) -> None:
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    linear = nn.Linear(24, 40)
    basis = random_basis(24, 40, generator, torch.device("cpu"))
    x, g = (torch.randn(3, 7, n, generator=generator) for n in (24, 40))
    g[1] = 0
    found = []
    for layer in (
        PaperLinear(linear, basis, 960, product),
        SparseGradLinear.from_linear(linear, basis, k=960),  # all entries: no ties to break
    ):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        trained = layer.weight if isinstance(layer, PaperLinear) else layer.delta
        found.append((y.detach(), leaf.grad, trained.grad.to_dense(), layer.bias.grad))
    for paper, ours in zip(*found, strict=True):
        torch.testing.assert_close(paper, ours, rtol=1e-4, atol=1e-4)


def test_table_of_a_graph_timed_as_a_whole() -> None:
    shared = {"model": "minilm", "task": "cola", "status": "measured", "about": "", "batch": 2}
    shared |= {"tokens": 8, "nonzero_tokens": 4, "peak_bytes": None, "steps_per_second": 2.0}
    parts = {"forward": 0.1, "backward": 0.25, "step": 0.15}
    rows = [
        {**shared, "method": "regular FT", "seconds": {"all": 0.5, **parts}},
        {**shared, "method": "LoRA", "seconds": {"all": 0.5}},
    ]
    whole, graph = (tables.tasks_table([row]) for row in rows)
    assert "250" in whole and "250" not in graph


def test_crossings_lie_where_the_lines_meet() -> None:
    points = [{"value": n, "seconds": {"ours": n**0.5, "peer": n / 10}} for n in (1, 400, 1000)]
    assert crossings(points, "ours", "peer") == pytest.approx([100])


def test_gathering_costs_what_reducing_does_at_one_over_density_ranks() -> None:
    entries, ranks = 10_000, 100
    gathered = communication.all_gather(0.01 * entries, ranks)
    assert gathered == pytest.approx(communication.all_reduce(entries, ranks))


@pytest.mark.parametrize("name", glue.TASKS)
def test_lengths_have_the_published_mean(name: str) -> None:
    task = glue.TASKS[name]
    lengths = task.lengths(20_000, 10_000, torch.Generator().manual_seed(0))
    assert lengths.double().mean() == pytest.approx(task.mean_length, rel=0.02)


def test_full_covers_the_quick_cases_for_the_main_shape() -> None:
    full = cases(True, False, ("fraction", "density"))
    assert Case() in full and len(full) == len(set(full))
    assert {case.fraction for case in full} == {1.0, 0.75, 0.5, 0.25, 0.1}
    assert {case.density for case in full} == {0.002, 0.01, 0.04}
