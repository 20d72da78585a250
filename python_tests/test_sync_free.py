"""The form of layer and optimizer that never makes the host wait for the device.

It serves GPUs and Triton's interpreter. Here it runs on CPU tensors too, with whatever kernels are
loaded; on a CUDA device the same step is captured in a graph.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import orthogonal, sparse_matrix
from sparsegrad_kernels import Basis, SparseAdam, SparseGradLinear, _gradient
from sparsegrad_kernels.linear import find_layers
from sparsegrad_kernels.ops import _library

BASES = ["identity", "full", "truncated", "in", "out truncated"]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in _library.SYNC_FREE_DEVICES,
    reason="no GPU with kernels for it",
)

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class NoReads(TorchDispatchMode):
    """Fails where a result or a shape depends on a tensor's content."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise AssertionError(f"{func} reads the device")
        if func is torch.ops.sparsegrad_kernels._fold_delta_.default:
            with self:
                return _gradient.fold_delta(*args)
        if func is torch.ops.aten.index.Tensor:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean index"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sync_free(monkeypatch):
    monkeypatch.setattr(_library, "SYNC_FREE_DEVICES", {"cpu", "cuda"})


def make_basis(kind: str, in_: int, out: int, generator) -> Basis | None:
    if kind == "identity":
        return None
    basis = Basis(orthogonal(in_, generator), orthogonal(out, generator))
    if kind == "full":
        return basis
    if kind == "in":
        return basis.select(True, False)
    if kind == "out truncated":
        return basis.select(False, True).truncate(rank_out=max(1, 2 * out // 3))
    return basis.truncate(rank_in=in_ // 2, rank_out=2 * out // 3)


def steps(layer: SparseGradLinear, inputs, gradients, **options) -> None:
    train(layer, SparseAdam(layer.parameters(), **{"lr": 0.05, **options}), inputs, gradients)


def train(layer: SparseGradLinear, optimizer: SparseAdam, inputs, gradients) -> None:
    for x, g in zip(inputs, gradients, strict=True):
        optimizer.zero_grad()
        layer(x).backward(g)
        optimizer.step()


def data(generator, in_=7, out=11, tokens=15, n=4):
    inputs = [
        torch.randn(tokens, in_, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(n)
    ]
    return inputs, [sparse_matrix(tokens, out, torch.float64, generator, 0.6) for _ in range(n)]


@pytest.mark.parametrize("space", ["original", "transformed"])
@pytest.mark.parametrize("kind", BASES)
def test_trains_as_the_gathered_form(space, kind, generator, monkeypatch):
    linear = nn.Linear(7, 11).double()
    basis = make_basis(kind, 7, 11, generator)
    inputs, gradients = data(generator)
    weights, grads = [], []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(_library, "SYNC_FREE_DEVICES", devices)
        layer = SparseGradLinear.from_linear(linear, basis, k=9, weight_space=space)
        for x in inputs:
            x.grad = None
        steps(layer, inputs, gradients)
        weights.append(layer.dense_weight())
        grads.append([x.grad for x in inputs])
    assert not torch.equal(weights[0], linear.weight)
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "in_", "out"), [(2, 9, 8), (200, 9, 8), (200, 4, 30), (9, 30, 4)]
)
@pytest.mark.parametrize(
    ("r_in", "r_out"),
    [(1.0, 1.0), (0.3, 1.0), (1.0, 0.3), (0.3, 0.3), (1.0, None), (0.3, None), (None, 1.0)],
)
def test_every_order_of_products(tokens, in_, out, r_in, r_out, generator):
    g = sparse_matrix(tokens, out, torch.float64, generator, 0.6)
    x = torch.randn(tokens, in_, generator=generator, dtype=torch.float64)
    u = None if r_in is None else orthogonal(in_, generator)[: max(1, int(r_in * in_))]
    v = None if r_out is None else orthogonal(out, generator)[: max(1, int(r_out * out))]
    dense = (g if v is None else g @ v.T).T @ (x if u is None else x @ u.T)
    k = max(1, dense.numel() // 3)
    indices, values = _gradient.sync_free_rotated_grad_topk(g, x, u, v, k, None)
    torch.testing.assert_close(values, dense[indices[0], indices[1]])
    wanted = dense.abs().flatten().topk(k).values.sort().values
    torch.testing.assert_close(values.abs().sort().values, wanted)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("written", [0, 3, 9, 10, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fold_takes_whatever_was_written(kind, written, dtype, sync_free, generator):
    layer = SparseGradLinear.from_linear(
        nn.Linear(7, 11).double(), make_basis(kind, 7, 11, generator), k=9, delta_dtype=dtype
    )
    before = layer.dense_weight()
    update = torch.zeros_like(layer.delta)
    places = torch.randperm(update.numel(), generator=generator)[:written]
    update.view(-1)[places] = torch.randn(len(places), generator=generator).to(dtype)
    with torch.no_grad():
        layer.delta.copy_(update)
    update = update.double()
    update = update if layer.u is None else update @ layer.u
    update = update if layer.v is None else layer.v.T @ update
    torch.testing.assert_close(layer.dense_weight(), before + update)
    assert not layer.delta.any()


def test_what_a_graph_writes_is_folded(sync_free, monkeypatch, generator):
    """A captured forward folds whatever came before; later folds do, for replays count no versions.

    So does writing to `.data`, which takes a replay's place here.
    """
    layer = SparseGradLinear.from_linear(
        nn.Linear(7, 11).double(), make_basis("full", 7, 11, generator), k=9
    )

    def replay() -> torch.Tensor:
        layer.delta.data[2, 3] = 1
        return before + torch.outer(layer.v[2], layer.u[3])

    before = layer.dense_weight()
    expected = replay()
    with monkeypatch.context() as graph:
        graph.setattr("sparsegrad_kernels.linear.is_captured", lambda tensor: True)
        layer(torch.ones(2, 7, dtype=torch.float64))
    assert not layer.delta.any()
    torch.testing.assert_close(layer.dense_weight(), expected)
    for _ in range(2):
        before = layer.dense_weight()
        expected = replay()
        torch.testing.assert_close(layer.dense_weight(), expected)


def test_what_a_graph_with_a_compiled_forward_writes_is_folded(sync_free, generator):
    """Nobody notices the capture of compiled code."""
    torch._dynamo.reset()
    linear, basis = nn.Linear(7, 11).double(), make_basis("full", 7, 11, generator)
    layer = SparseGradLinear.from_linear(linear, basis, k=9)
    torch.compile(layer, fullgraph=True)(torch.ones(2, 7, dtype=torch.float64))
    for _ in range(2):
        before = layer.dense_weight()
        layer.delta.data[2, 3] = 1
        expected = before + torch.outer(layer.v[2], layer.u[3])
        torch.testing.assert_close(layer.dense_weight(), expected)


def test_a_compiled_layer_is_used_twice_in_one_pass(sync_free, generator):
    """Eagerly: folding at every use writes nothing that autograd would have to know of."""
    torch._dynamo.reset()
    layer = SparseGradLinear.from_linear(nn.Linear(7, 11).double(), k=9)
    (x, *_), (g, *_) = data(generator)
    torch.compile(layer, fullgraph=True)(x)
    (layer(x) + layer(x)).backward(g)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


def test_accumulated_gradients_are_summed(sync_free, generator):
    linear = nn.Linear(7, 11).double()
    (x, _, _, _), (g, h, _, _) = data(generator)
    layer, peer = (SparseGradLinear.from_linear(linear, k=9) for _ in range(2))
    for each in (g, h):
        layer(x).backward(each)
    for each in (g, h):
        peer(x).backward(each)
    peer.delta.grad = peer.delta.grad.coalesce()
    for module in (layer, peer):
        SparseAdam(module.parameters(), lr=0.05).step()
    torch.testing.assert_close(layer.weight, peer.weight)


def test_the_optimizer_finds_the_layer_of_a_copy():
    def layer_of(param):
        return find_layers().get(id(param))

    layer = SparseGradLinear(7, 11, k=9)
    shallow, restored = copy.copy(layer), pickle.loads(pickle.dumps(layer))
    for each in (layer, copy.deepcopy(layer), restored, layer.double()):
        assert layer_of(each.delta) is each
    assert layer_of(shallow.delta) is layer
    assert layer_of(layer.weight) is layer_of(layer.bias) is None
    transformed = SparseGradLinear(7, 11, k=9, weight_space="transformed")
    assert layer_of(transformed.weight) is transformed
    delta = restored.delta
    del restored, each
    assert layer_of(delta) is None


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("space", ["original", "transformed"])
def test_nothing_is_read(space, kind, sync_free, generator):
    """Between the operators; inside them it is their own tests that look."""
    layer = SparseGradLinear.from_linear(
        nn.Linear(7, 11).double(), make_basis(kind, 7, 11, generator), k=9, weight_space=space
    )
    optimizer = SparseAdam(layer.parameters(), lr=torch.tensor(0.05), capturable=True)
    batches = data(generator)
    with NoReads():
        train(layer, optimizer, *batches)


def test_a_read_is_noticed():
    with pytest.raises(AssertionError, match="reads the device"), NoReads():
        torch.ones(2).sum().item()


@needs_gpu
@pytest.mark.parametrize("kind", BASES)
def test_step_in_a_cuda_graph(kind, generator):
    device = torch.device("cuda")
    linear = nn.Linear(64, 96, device=device)
    basis = make_basis(kind, 64, 96, generator)
    basis = None if basis is None else basis.to(device, torch.float32)
    inputs, gradients = data(generator, 64, 96, 128, 6)
    inputs = [x.detach().to(device, torch.float32) for x in inputs]
    gradients = [g.to(device, torch.float32) for g in gradients]
    layers = [SparseGradLinear.from_linear(linear, basis, k=61) for _ in range(2)]
    x, g = inputs[0].clone(), gradients[0].clone()
    optimizers = [SparseAdam(m.parameters(), lr=1e-2, capturable=True) for m in layers]

    def step(layer, optimizer, x, g):
        layer(x).backward(g)
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(layers[0], optimizers[0], inputs[0], gradients[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layers[1], optimizers[1], x, g)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(layers[0].dense_weight(), layers[1].dense_weight())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layers[1], optimizers[1], x, g)
    for other_x, other_g in zip(inputs[1:], gradients[1:], strict=True):
        step(layers[0], optimizers[0], other_x, other_g)
        x.copy_(other_x)
        g.copy_(other_g)
        graph.replay()
        torch.testing.assert_close(layers[0].dense_weight(), layers[1].dense_weight())


@needs_gpu
@pytest.mark.parametrize("kind", BASES)
def test_compile_fullgraph_on_the_device(kind, generator):
    torch._dynamo.reset()
    device = torch.device("cuda")
    basis = make_basis(kind, 64, 96, generator)
    basis = None if basis is None else basis.to(device, torch.float32)
    eager = SparseGradLinear.from_linear(nn.Linear(64, 96, device=device), basis, k=61)
    inner = copy.deepcopy(eager)
    compiled = torch.compile(inner, fullgraph=True)
    inputs, gradients = data(generator, 64, 96, 128)
    inputs = [x.detach().to(device, torch.float32) for x in inputs]
    gradients = [g.to(device, torch.float32) for g in gradients]
    for module, layer in ((eager, eager), (compiled, inner)):
        optimizer = SparseAdam(layer.parameters(), lr=1e-2)
        for x, g in zip(inputs, gradients, strict=True):
            optimizer.zero_grad()
            module(x).backward(g)
            optimizer.step()
    torch.testing.assert_close(eager.dense_weight(), inner.dense_weight())
