from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from cases import orthogonal
from sparsegrad_kernels import Basis, SparseAdam, SparseGradLinear
from sparsegrad_kernels.ops import topk_coo


def sparse(dense: torch.Tensor, k: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(*topk_coo(dense, k), dense.shape, check_invariants=True)


def random_gradients(n: int, generator: torch.Generator, shape=(20, 30)) -> list[torch.Tensor]:
    return [torch.randn(*shape, generator=generator) * 10.0 ** (i % 3 - 1) for i in range(n)]


def train(optimizer, param, gradients, schedule=None):
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        if schedule is not None:
            schedule.step()


@pytest.mark.parametrize("lr", [0.1, 1e-3])
def test_sparse_equals_torch(lr, generator):
    start = torch.randn(20, 30, generator=generator)
    gradients = [sparse(g, 25) for g in random_gradients(40, generator)]
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    settings = {"lr": lr, "betas": (0.8, 0.99), "eps": 1e-6}
    train(SparseAdam([params[0]], weight_decay=0.5, **settings), params[0], gradients)
    train(torch.optim.SparseAdam([params[1]], **settings), params[1], gradients)
    assert not torch.equal(params[0], start)
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


def test_dense_equals_adamw(generator):
    start = torch.randn(20, 30, generator=generator)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    gradients = random_gradients(40, generator)
    settings = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    train(SparseAdam([params[0]], **settings), params[0], gradients)
    train(torch.optim.AdamW([params[1]], **settings), params[1], gradients)
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


def test_duplicates_are_summed(generator):
    start = torch.randn(5, 6, generator=generator)
    indices = torch.tensor([[0, 3, 0], [1, 2, 1]])
    values = torch.tensor([1.0, -2.0, 0.5])
    twice = torch.sparse_coo_tensor(indices, values, (5, 6), check_invariants=True)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    train(SparseAdam([params[0]], lr=0.1), params[0], [twice] * 3)
    train(torch.optim.SparseAdam([params[1]], lr=0.1), params[1], [twice.coalesce()] * 3)
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


def layer(generator) -> SparseGradLinear:
    basis = Basis(orthogonal(6, generator).float(), orthogonal(8, generator).float())
    return SparseGradLinear(6, 8, basis, k=10)


def test_gradient_accumulation(generator):
    """Two halves of a batch before a step: the sum of what each half selects."""
    ours = layer(generator)
    peer = copy.deepcopy(ours)
    halves = [torch.randn(4, 6, generator=generator) for _ in range(2)]
    total = torch.zeros(8, 6)
    for x in halves:
        peer.zero_grad()
        peer(x).square().sum().backward()
        total += peer.delta.grad.to_dense()
        ours(x).square().sum().backward()
    n = int((total != 0).sum())
    assert 10 < n == ours.delta.grad.coalesce()._nnz()
    SparseAdam([ours.delta], lr=0.1).step()
    peer.delta.grad = sparse(total, n)
    torch.optim.SparseAdam([peer.delta], lr=0.1).step()
    torch.testing.assert_close(ours.delta, peer.delta)


def test_mixed_model_groups_and_schedule(generator):
    model = nn.Sequential(layer(generator), nn.ReLU(), nn.Linear(8, 2))
    optimizer = SparseAdam(
        [
            {"params": model[0].parameters(), "lr": 1e-2},
            {"params": model[2].parameters(), "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        model(torch.randn(5, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-4])
    model[0].fold()
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_state_dict_resumes_exactly(generator):
    batches = [torch.randn(5, 6, generator=generator) for _ in range(6)]

    def run(model, optimizer, batches):
        for x in batches:
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = layer(generator)
    resumed = copy.deepcopy(whole)
    run(whole, SparseAdam(whole.parameters(), lr=0.01), batches)
    optimizer = SparseAdam(resumed.parameters(), lr=0.01)
    run(resumed, optimizer, batches[:3])
    buffer = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    fresh = copy.deepcopy(resumed)
    with torch.no_grad():
        fresh.weight.zero_()
    fresh.load_state_dict(saved["model"])
    optimizer = SparseAdam(fresh.parameters(), lr=0.5)
    optimizer.load_state_dict(saved["optimizer"])
    run(fresh, optimizer, batches[3:])
    assert torch.equal(fresh.weight, whole.weight)
    assert torch.equal(fresh.bias, whole.bias)


def test_closure_and_no_gradient(generator):
    param, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = SparseAdam([param, idle], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (param < 1).all()
    assert (idle == 1).all()
    assert idle not in optimizer.state


def test_grad_scaler(generator):
    """The scaler sees an infinity in a sparse gradient, and skips the step."""
    model = layer(generator)
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.randn(5, 6, generator=generator)
    for bad in (False, True):
        optimizer.zero_grad()
        before = model.weight.clone()
        loss = model(x).square().sum() * (torch.inf if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) == bad


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
@pytest.mark.parametrize("foreach", [None, False])
def test_torch_clips_sparse_gradients(max_norm, norm_type, foreach, generator):
    ours, peer = ([nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(3))] for _ in "ab")
    kept = sparse(torch.randn(5, 6, generator=generator), 7).coalesce()
    ours[0].grad = torch.sparse_coo_tensor(  # each entry in two halves
        kept.indices().repeat(1, 2), (kept.values() / 2).repeat(2), (5, 6), check_invariants=True
    )
    ours[1].grad = torch.randn(3, generator=generator)
    peer[0].grad, peer[1].grad = kept.to_dense(), ours[1].grad.clone()
    got, wanted = (
        nn.utils.clip_grad_norm_(params, max_norm, norm_type, foreach=foreach)
        for params in (ours, peer)
    )
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ours[0].grad.to_dense(), peer[0].grad)
    torch.testing.assert_close(ours[1].grad, peer[1].grad)
    with pytest.raises(ValueError, match="that of all its entries, got dim"):
        torch.linalg.vector_norm(kept, dim=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"lr": float("nan")}, "lr must not be negative, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must lie in \[0, 1\), got 1.0"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"weight_decay": -1}, "weight_decay must not be negative, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseAdam([nn.Parameter(torch.zeros(1))], **settings)
