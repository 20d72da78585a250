from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import orthogonal, sparse_matrix
from sparsegrad_kernels import Basis, SparseGradLinear
from sparsegrad_kernels.diagnostics import Recorder, draw, nonzero_shares, topk_energy


def two_blocks(generator, basis: bool | str = True) -> nn.Sequential:
    bases = [None, None]
    if basis:
        u, v = orthogonal(6, generator, torch.float32), orthogonal(10, generator, torch.float32)
        energy_in, energy_out = torch.arange(6.0, 0, -1), torch.arange(10.0, 0, -1)
        bases = [Basis(u, v, energy_in, energy_out), Basis(v, u, energy_out, energy_in)]
    if basis == "smaller":
        bases = [bases[0].select(True, False), bases[1].select(False, True)]
    blocks = [
        nn.ModuleDict(
            {
                "up": SparseGradLinear(6, 10, bases[0], k=5),
                "down": SparseGradLinear(10, 6, bases[1], k=4),
            }
        )
        for _ in range(2)
    ]
    return nn.ModuleList(blocks)


def forward(model, x):
    for block in model:
        x = block["down"](torch.tanh(block["up"](x)))
    return x


def test_shares_and_energies():
    g = torch.tensor([[0.0, 1.0, torch.nan], [0.0, 0.0, 0.0]])
    assert nonzero_shares(g) == pytest.approx((1 / 2, 2 / 3, 2 / 6))
    assert topk_energy(torch.tensor([[3.0, 0.0], [-4.0, 0.0]]), 1) == pytest.approx(16 / 25)
    assert topk_energy(torch.ones(2, 2), 9) == 1


@pytest.mark.parametrize("basis", [True, False, "smaller"])
def test_records_what_a_dense_gradient_shows(basis, generator):
    model = two_blocks(generator, basis)
    x = torch.randn(7, 6, generator=generator)
    g = sparse_matrix(7, 6, torch.float32, generator)
    recorder = Recorder(model, every=2)
    with recorder:
        for _ in range(5):
            forward(model, x).backward(g)
    forward(model, x).backward(g)  # no longer watched
    diagnosis = recorder.diagnosis()
    assert list(diagnosis) == ["1.up", "1.down"]
    record, layer = diagnosis["1.down"], model[1]["down"]
    assert record.steps == [0, 2, 4]
    assert record.k == 4

    hidden = []
    handle = layer.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach()))
    forward(model, x)
    handle.remove()
    dense = g.T @ hidden[0]
    rotated = dense if layer.v is None else layer.v @ dense
    rotated = rotated if layer.u is None else rotated @ layer.u.T
    assert (layer.v is None, layer.u is None) == {True: (False,) * 2, False: (True,) * 2}.get(
        basis, (False, True)
    )
    torch.testing.assert_close(record.gradient, dense.abs())
    torch.testing.assert_close(record.rotated, rotated.abs())
    torch.testing.assert_close(record.grad_output, g.abs())
    shares = (record.nonzero_rows[-1], record.nonzero_cols[-1], record.nonzero_entries[-1])
    assert shares == nonzero_shares(g)
    # A gradient of zeros has no energy.
    assert record.kept_energy[-1] == pytest.approx(topk_energy(rotated, 4), nan_ok=True)
    original = pytest.approx(topk_energy(dense, 4), nan_ok=True)
    assert record.kept_energy_original[-1] == original


def test_training_is_not_changed(generator):
    model = two_blocks(generator)
    x = torch.randn(7, 6, generator=generator)
    gradients = []
    for recorder in (None, Recorder(model, every=1)):
        model.zero_grad()
        if recorder is None:
            forward(model, x).square().sum().backward()
        else:
            with recorder:
                forward(model, x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before.to_dense(), after.to_dense())
    with recorder, torch.no_grad():
        forward(model, x)


def test_truncated_basis_counts_what_it_leaves_out(generator):
    basis = Basis(orthogonal(6, generator).float(), orthogonal(10, generator).float())
    layer = nn.Sequential(SparseGradLinear(6, 10, basis.truncate(rank_in=2, rank_out=3), k=6))
    recorder = Recorder(layer, every=1)
    x, g = torch.randn(9, 6, generator=generator), torch.randn(9, 10, generator=generator)
    with recorder:
        layer(x).backward(g)
    record = recorder.diagnosis()["0"]
    dense = g.T @ x
    wanted = record.rotated.square().sum() / dense.square().sum()  # k is all there is
    assert record.kept_energy == [pytest.approx(wanted.item(), rel=1e-4)]


@pytest.mark.parametrize("basis", [True, False, "smaller"])
def test_figures(basis, generator, tmp_path):
    pytest.importorskip("matplotlib")
    model = two_blocks(generator, basis)
    with Recorder(model, every=1) as recorder:
        for _ in range(3):
            forward(model, torch.randn(7, 6, generator=generator)).square().sum().backward()
    figures = draw(recorder.diagnosis())
    names = ["gradients", "grad_output", "nonzeros", "energy"]
    assert list(figures) == names + ["spectra"] * bool(basis)
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    if basis:  # The ranks that `truncate` would keep: 8, 9 and 10 of 10 vectors, all of 6.
        drawn = {
            axes.get_title(): [text.get_text() for text in axes.texts]
            for axes in figures["spectra"].axes
        }
        assert drawn["1.up: in"] == ["0.9: 6", "0.95: 6", "0.99: 6"]
        assert drawn["1.down: out"] == ["0.9: 6", "0.95: 6", "0.99: 6"]
        if basis is True:
            assert drawn["1.up: out"] == ["0.9: 8", "0.95: 10", "0.99: 10"]


def test_bad_input(generator):
    with pytest.raises(ValueError, match="convert it first"):
        Recorder(nn.Linear(2, 2))
    model = two_blocks(generator)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Recorder(model, every=0)
    with pytest.raises(ValueError, match=r"layers must be among .*0.up.* got \['2.up'\]"):
        Recorder(model, layers=["2.up"])
    with pytest.raises(ValueError, match="no backward pass was recorded"):
        draw(Recorder(model).diagnosis())
