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
    torch.testing.assert_close(ours.weight, peer.weight)


def rotated(kind: str, generator, **settings) -> SparseGradLinear:
    basis = {
        "identity": None,
        "full": Basis(orthogonal(6, generator), orthogonal(8, generator)),
        "smaller": Basis(orthogonal(6, generator), None),
        "truncated": Basis(orthogonal(6, generator)[:4], orthogonal(8, generator)[:5]),
    }[kind]
    return SparseGradLinear(6, 8, basis, k=10, **settings)


def batches_of(n: int, generator) -> list[torch.Tensor]:
    return [torch.randn(5, 6, generator=generator) for _ in range(n)]


def run(model, optimizers, batches) -> None:
    for x in batches:
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("kind", ["identity", "full", "smaller", "truncated"])
def test_layer_trains_as_with_torch(kind, beta1, generator):
    """A delta of no memory, folded in the step, against one that is read at the next forward."""
    ours = rotated(kind, generator)
    peer = copy.deepcopy(ours)
    batches, settings = batches_of(9, generator), {"lr": 0.05, "betas": (beta1, 0.99)}
    optimizer = SparseAdam(ours.parameters(), weight_decay=0.1, **settings)
    assert ours.delta.untyped_storage().nbytes() == 4
    run(ours, [optimizer], batches)
    foreign = torch.optim.SparseAdam([peer.delta], **settings)
    dense = torch.optim.AdamW([peer.bias], weight_decay=0.1, **settings)
    run(peer, [foreign, dense], batches)
    assert ours.delta.untyped_storage().nbytes() == 4
    assert ("exp_avg" in optimizer.state[ours.delta]) == (beta1 > 0)
    torch.testing.assert_close(ours.dense_weight(), peer.dense_weight())
    torch.testing.assert_close(ours.bias, peer.bias)
    assert torch.equal(ours._parameters["weight"], ours.weight)  # nothing waits to be folded


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_training_keeps(dtype, beta1, generator):
    """Of a layer the moments; of all layers of a size, one workspace."""
    layers = [SparseGradLinear(6, 6, k=4, bias=False, delta_dtype=dtype) for _ in range(3)]
    model = nn.Sequential(*layers)
    optimizer = SparseAdam(model.parameters(), betas=(beta1, 0.999))
    run(model, [optimizer], batches_of(2, generator))
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in model
        for t in (layer.delta, *optimizer.state[layer.delta].values())
        if t.numel() > 1
    }
    kept |= {t.data_ptr(): t.untyped_storage().nbytes() for t in optimizer._workspaces.values()}
    moments = 2 if beta1 else 1
    assert sum(kept.values()) == dtype.itemsize * ((3 * moments + 1) * 36 + 3)
    assert not any(t.any() for t in optimizer._workspaces.values())


def test_first_moment_begins_where_its_decay_does(generator):
    ours = rotated("full", generator)
    optimizer = SparseAdam(ours.parameters(), lr=0.05, betas=(0.0, 0.99))
    run(ours, [optimizer], batches_of(3, generator))
    assert "exp_avg" not in optimizer.state[ours.delta]
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.99)
    peer = copy.deepcopy((ours, optimizer))
    peer[1].state[peer[0].delta]["exp_avg"] = torch.zeros(8, 6)
    batches = batches_of(3, generator)
    run(ours, [optimizer], batches)
    run(peer[0], [peer[1]], batches)
    assert torch.equal(ours.weight, peer[0].weight)


@pytest.mark.parametrize("write", ["torch", "sgd", "by hand"])
def test_another_optimizer_is_refused(write, generator):
    model = rotated("full", generator)
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    run(model, [optimizer], batches_of(2, generator))
    before = model.weight.clone()
    model(batches_of(1, generator)[0]).square().sum().backward()
    cls = torch.optim.SparseAdam if write == "torch" else torch.optim.SGD
    if write == "by hand":
        with torch.no_grad():
            model.delta[0, 0] = 1.0
    else:
        cls([model.delta], lr=0.1).step()
    with pytest.raises(RuntimeError, match="the write is lost. Train with that optimizer only"):
        model(torch.ones(1, 6))
    assert torch.equal(model.weight, before)
    # A copy has its memory, and takes any optimizer; the layer itself goes on with its own.
    copied = copy.deepcopy(model)
    for each, other in ((copied, cls([copied.delta], lr=0.1)), (model, optimizer)):
        run(each, [other], batches_of(2, generator))
        assert not torch.equal(each.weight, before)


def test_another_optimizer_is_refused_by_a_compiled_layer(generator):
    torch._dynamo.reset()
    model = rotated("full", generator)
    ours, other = SparseAdam(model.parameters(), lr=0.1), torch.optim.SGD([model.delta], lr=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batches = batches_of(4, generator)
    run(compiled, [ours], batches[:2])
    run(compiled, [other], batches[2:3])
    with pytest.raises(RuntimeError, match="the write is lost"):
        run(compiled, [other], batches[3:])
    before = model.weight.clone()
    run(compiled, [ours], batches)
    assert not torch.equal(model.weight, before)


def test_what_is_no_write(generator):
    """A move that fails, a shallow copy, a call with other parameters."""
    model = rotated("full", generator)
    model.load_state_dict(rotated("full", generator).state_dict())
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    batches = batches_of(2, generator)
    run(model, [optimizer], batches)

    def fail(tensor):
        raise MemoryError

    with pytest.raises(MemoryError):
        model._apply(fail)
    run(model, [optimizer], batches)
    shallow = copy.copy(model)
    assert model.delta.untyped_storage().nbytes() == 4
    run(model, [optimizer], batches)
    assert torch.equal(shallow(batches[0]), model(batches[0]))
    clones = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.func.functional_call(model, clones, (batches[0],))
    run(model, [optimizer], batches)


def test_a_frozen_layer(generator):
    """Its delta is kept until it is trained after all, and again no harm is done by freezing it."""
    model = rotated("full", generator)
    model.delta.requires_grad_(False)
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    batches, before = batches_of(2, generator), model.weight.clone()
    run(model, [optimizer], batches)
    assert torch.equal(model.weight, before)
    model.delta.requires_grad_(True)
    run(model, [optimizer], batches)
    assert model.delta.untyped_storage().nbytes() == 4
    trained = model.weight.clone()
    assert not torch.equal(trained, before)
    model.delta.requires_grad_(False)
    run(model, [optimizer, SparseAdam(copy.deepcopy(model).parameters())], batches)
    assert torch.equal(model.weight, trained)


@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_torch_puts_another_parameter_in_its_place(way, generator):
    setting = f"set_{way}_module_params_on_conversion"
    getattr(torch.__future__, setting)(True)
    try:
        model = rotated("full", generator)
        SparseAdam(model.parameters())
        model.double()
    finally:
        getattr(torch.__future__, setting)(False)
    assert model.delta.untyped_storage().nbytes() == 8
    before = model.weight.clone()
    optimizer = SparseAdam(model.parameters())
    run(model, [optimizer], [x.double() for x in batches_of(2, generator)])
    assert not torch.equal(model.weight, before)


def test_a_captured_step_of_a_delta_with_memory_leaves_it(generator, monkeypatch):
    """A graph reads and writes it."""
    model = rotated("full", generator)
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    batches = batches_of(2, generator)
    run(model, [optimizer], batches)
    model, optimizer = copy.deepcopy((model, optimizer))
    model(batches[0]).square().sum().backward()
    memory = model.delta.data_ptr()
    with monkeypatch.context() as graph:
        graph.setattr("sparsegrad_kernels.linear.is_captured", lambda tensor: True)
        optimizer.step()
    assert model.delta.data_ptr() == memory
    before = model.weight.clone()
    run(model, [optimizer], batches)
    assert not torch.equal(model.weight, before)
    assert model.delta.data_ptr() == memory


def test_a_layer_of_an_older_pickle(generator):
    model = rotated("full", generator)
    state = model.__getstate__()
    del state["_is_compiled"], state["_is_in_graph"]
    old = SparseGradLinear.__new__(SparseGradLinear)
    old.__setstate__(copy.deepcopy({**state, "_always_folds": False}))
    run(old, [SparseAdam(old.parameters())], batches_of(2, generator))
    assert not torch.equal(old.weight, model.weight)


@pytest.mark.parametrize("change", ["to", "half and back", "load_state_dict", "eval"])
def test_delta_stays_without_memory(change, generator):
    model = rotated("full", generator)
    peer = copy.deepcopy(model)
    batches = batches_of(4, generator)
    optimizer = SparseAdam(model.parameters(), lr=0.05)
    run(model, [optimizer], batches[:2])
    run(peer, [peers := SparseAdam(peer.parameters(), lr=0.05)], batches[:2])
    if change == "to":
        model.to("cpu")
    elif change == "half and back":
        for each in (model, peer):  # which changes the weight
            each.bfloat16()
            each.float()
    elif change == "load_state_dict":
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.weight.zero_()
        model.load_state_dict(state)
    else:
        model.eval().train()
    assert model.delta.untyped_storage().nbytes() == 4
    run(model, [optimizer], batches[2:])
    run(peer, [peers], batches[2:])
    assert torch.equal(model.weight, peer.weight)


def test_a_step_that_fails_leaves_nothing_behind(generator, monkeypatch):
    model = rotated("full", generator)
    peer = copy.deepcopy(model)
    batches = batches_of(2, generator)
    optimizers = [SparseAdam(m.parameters(), lr=0.05, betas=(0.0, 0.99)) for m in (model, peer)]
    model(batches[0]).square().sum().backward()

    def fail(layer, update):
        assert update.any()
        raise RuntimeError("as if out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SparseGradLinear, "fold_update", fail)
        with pytest.raises(RuntimeError, match="as if"):
            optimizers[0].step()
    assert not any(t.any() for t in optimizers[0]._workspaces.values())
    assert torch.equal(model.weight, peer.weight)


def test_a_dense_gradient_of_delta_is_refused(generator):
    model = rotated("full", generator)
    optimizer = SparseAdam(model.parameters(), lr=0.05)
    before = model.weight.clone()
    model(torch.ones(1, 6)).sum().backward()
    model.delta.grad = model.delta.grad.to_dense()
    with pytest.raises(ValueError, match="whose gradient must be sparse .COO., got layout"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    model.delta.grad = sparse(model.delta.grad, 10)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_delta_whose_layer_is_gone(generator):
    model = rotated("full", generator)
    optimizer = SparseAdam(model.parameters(), lr=0.05)
    model(torch.ones(1, 6)).sum().backward()
    del model
    with pytest.raises(RuntimeError, match="params has the delta of a .* that is no more"):
        optimizer.step()
    assert not optimizer.state


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
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_state_dict_resumes_exactly(generator):
    batches = [torch.randn(5, 6, generator=generator) for _ in range(6)]

    whole = layer(generator)
    resumed = copy.deepcopy(whole)
    run(whole, [SparseAdam(whole.parameters(), lr=0.01)], batches)
    optimizer = SparseAdam(resumed.parameters(), lr=0.01)
    run(resumed, [optimizer], batches[:3])
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
    run(fresh, [optimizer], batches[3:])
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
