from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cases import orthogonal, sparse_matrix
from sparsegrad_kernels import Basis, SparseAdam, SparseGradConfig, SparseGradLinear, _gradient
from sparsegrad_kernels._gradient import rotated_grad_topk
from sparsegrad_kernels.ops import _library, topk_coo

SPACES = ["original", "transformed"]
BASES = ["identity", "full", "truncated", "in", "out truncated"]
OPS = torch.ops.sparsegrad_kernels


def make_basis(kind: str, in_: int, out: int, generator: torch.Generator, dtype=torch.float64):
    if kind == "identity":
        return None
    basis = Basis(orthogonal(in_, generator, dtype), orthogonal(out, generator, dtype))
    if kind == "full":
        return basis
    if kind == "in":
        return basis.select(True, False)
    if kind == "out truncated":
        return basis.select(False, True).truncate(rank_out=max(1, 2 * out // 3))
    return basis.truncate(rank_in=max(1, in_ // 2), rank_out=max(1, 2 * out // 3))


def count_flops() -> FlopCounterMode:
    """With the product that `grad_weight_topk` selects from, of which it may make less."""
    formulas = {
        OPS.grad_weight_topk: lambda g, x, *args, **kwargs: 2 * g[0] * g[1] * x[1],
        OPS.sparse_dense_mm: lambda a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
        OPS._token_products: lambda g, x, weight, *args, **kwargs: (
            2 * g[0] * g[1] * sum(other[1] for other in (x, weight) if other is not None)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


class ThreeLinears(nn.Module):
    """The paper's Table 2 by plain autograd: U^T frozen, W~ trained, V frozen; dense gradients."""

    def __init__(self, linear: nn.Linear, basis: Basis | None) -> None:
        super().__init__()
        out, in_ = linear.weight.shape
        u, v = (None, None) if basis is None else (basis.u, basis.v)
        self.u = torch.eye(in_).double() if u is None else u
        self.v = torch.eye(out).double() if v is None else v
        weight = self.v @ linear.weight.detach() @ self.u.T
        self.frozen = linear.weight.detach() - self.v.T @ weight @ self.u
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        transformed = ((x @ self.u.T) @ self.weight.T) @ self.v
        return transformed + x @ self.frozen.T + self.bias

    def dense_weight(self) -> torch.Tensor:
        return (self.v.T @ self.weight @ self.u + self.frozen).detach()


def sparse_parameter(layer: SparseGradLinear) -> nn.Parameter:
    return layer.weight if layer.delta is None else layer.delta


def problem(generator, in_=7, out=11, tokens=(3, 5), keep=0.6):
    linear = nn.Linear(in_, out).double()
    x = torch.randn(*tokens, in_, generator=generator, dtype=torch.float64)
    total = x[..., 0].numel()
    g = sparse_matrix(total, out, torch.float64, generator, keep)
    if keep:
        g[-1, -1] = 1  # by chance nothing may be left, and a gradient of zeros moves nothing
    return linear, x, g.reshape(*tokens, out)


def check_equals_three_linears(linear, basis, x, g, k, space):
    layer = SparseGradLinear.from_linear(linear, basis, k=k, weight_space=space)
    peer = ThreeLinears(linear, basis)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(value) for module, value in zip((layer, peer), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for output in outputs:
        output.backward(g)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, peer.bias.grad, rtol=1e-10, atol=1e-10)
    gradient = sparse_parameter(layer).grad
    assert gradient.layout is torch.sparse_coo
    assert gradient._nnz() == layer.k == min(k, peer.weight.numel())
    # Rounding may swap entries of equal size: compare sizes, then values at the chosen places.
    chosen, dense = gradient.coalesce(), peer.weight.grad
    largest = topk_coo(dense, k)[1].abs().sort().values
    torch.testing.assert_close(chosen.values().abs().sort().values, largest, rtol=1e-9, atol=1e-10)
    at = dense[chosen.indices()[0], chosen.indices()[1]]
    torch.testing.assert_close(chosen.values(), at, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("tokens", [(15,), (3, 5), (2, 2, 4), ()])
def test_equals_three_linears(space, kind, tokens, generator):
    linear, x, g = problem(generator, tokens=tokens)
    check_equals_three_linears(linear, make_basis(kind, 7, 11, generator), x, g, 9, space)


@settings(max_examples=60, deadline=None)
@given(
    in_=st.integers(1, 16),
    out=st.integers(1, 16),
    tokens=st.integers(1, 40),
    k=st.integers(1, 100),
    keep=st.floats(0, 1),
    space=st.sampled_from(SPACES),
    kind=st.sampled_from(BASES),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_property(in_, out, tokens, k, keep, space, kind, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    linear, x, g = problem(generator, in_, out, (tokens,), keep)
    if strided:
        x, g = x.T.contiguous().T, g.T.contiguous().T
    check_equals_three_linears(linear, make_basis(kind, in_, out, generator), x, g, k, space)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", BASES)
def test_dtypes(dtype, space, kind, generator):
    linear, x, g = problem(generator)
    basis = make_basis(kind, 7, 11, generator)
    peer = ThreeLinears(linear, basis)
    layer = SparseGradLinear.from_linear(linear.to(dtype), basis, k=60, weight_space=space)
    y = layer(x.to(dtype))
    y.backward(g.to(dtype))
    peer(x).backward(g)
    gradient = sparse_parameter(layer).grad
    assert y.dtype == gradient.dtype == layer.bias.grad.dtype == dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    entries = gradient.coalesce()
    at = peer.weight.grad[entries.indices()[0], entries.indices()[1]]
    assert (entries.values().double() - at).norm() <= limit * peer.weight.grad.norm()
    assert (y.double() - peer(x)).norm() <= limit * y.double().norm()


def dense_training(linear, basis, batches, k, lr):
    """SparseGrad from its equations: dense W~, top-k mask, SparseAdam by torch."""
    peer = ThreeLinears(linear, basis)
    sparse = torch.optim.SparseAdam([peer.weight], lr=lr)
    dense = torch.optim.AdamW([peer.bias], lr=lr)
    for x, target in batches:
        (peer(x) - target).square().sum().backward()
        indices, values = topk_coo(peer.weight.grad, k)
        peer.weight.grad = torch.sparse_coo_tensor(
            indices, values, peer.weight.shape, check_invariants=True
        )
        sparse.step()
        dense.step()
        peer.zero_grad()
    return peer


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", BASES)
def test_fifty_steps(space, kind, generator):
    linear, _, _ = problem(generator)
    basis = make_basis(kind, 7, 11, generator)
    batches = [
        (
            torch.randn(13, 7, generator=generator, dtype=torch.float64),
            torch.randn(13, 11, generator=generator, dtype=torch.float64),
        )
        for _ in range(50)
    ]
    peer = dense_training(linear, basis, batches, 9, 0.02)
    layer = SparseGradLinear.from_linear(linear, basis, k=9, weight_space=space)
    optimizer = SparseAdam(layer.parameters(), lr=0.02)
    for x, target in batches:
        (layer(x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (peer.dense_weight() - linear.weight).abs().max() > 0.05
    torch.testing.assert_close(layer.dense_weight(), peer.dense_weight(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.bias, peer.bias, rtol=1e-9, atol=1e-9)
    # The same through to_linear.
    x = batches[0][0]
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-10, atol=1e-10)


# Multiply-adds: tokens, in, out, r_in, r_out, and which product comes last.
ORDERS = {
    "tokens": (8, 40, 60, 40, 60),
    "v": (2000, 30, 40, 8, 40),
    "u": (2000, 40, 30, 40, 8),
}


@pytest.mark.parametrize("case", ORDERS)
def test_rotation_takes_the_cheapest_order(case, generator):
    n, in_, out, r_in, r_out = ORDERS[case]
    u, v = orthogonal(in_, generator)[:r_in], orthogonal(out, generator)[:r_out]
    g = torch.randn(n, out, generator=generator, dtype=torch.float64)
    x = torch.randn(n, in_, generator=generator, dtype=torch.float64)
    with count_flops() as counter:
        indices, values = rotated_grad_topk(g, x, u, v, 20)
    torch.testing.assert_close(values, (v @ g.T @ x @ u.T)[indices[0], indices[1]])
    costs = {
        "tokens": n * (out * r_out + in_ * r_in + r_out * r_in),
        "v": n * out * in_ + out * in_ * r_in + r_out * out * r_in,
        "u": n * out * in_ + r_out * out * in_ + r_out * in_ * r_in,
        "x first, v": n * in_ * r_in + n * out * r_in + r_out * out * r_in,
        "g first, u": n * out * r_out + n * r_out * in_ + r_out * in_ * r_in,
    }
    assert counter.get_total_flops() == 2 * min(costs.values())
    assert min(costs, key=costs.get).endswith(case)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("n", [30, 300])
def test_rotation_of_one_side_takes_the_cheaper_order(side, n, generator):
    """The activations, or for many tokens the gradient."""
    g = torch.randn(n, 60, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 50, generator=generator, dtype=torch.float64)
    size = 50 if side == "in" else 60
    basis = orthogonal(size, generator)[:40]
    u, v = (basis, None) if side == "in" else (None, basis)
    with count_flops() as counter:
        indices, values = rotated_grad_topk(g, x, u, v, 20)
    dense = g.T @ x @ u.T if v is None else v @ g.T @ x
    torch.testing.assert_close(values, dense[indices[0], indices[1]])
    tokens = n * size * 40 + n * 40 * (60 if side == "in" else 50)
    gradient = n * 60 * 50 + 60 * 50 * 40
    assert (tokens < gradient) == (n == 30)
    assert counter.get_total_flops() == 2 * min(tokens, gradient)


@pytest.mark.parametrize("case", [*ORDERS, "shorter x", "shorter g"])
@pytest.mark.parametrize("sides", ["both", "in", "out", "none"])
def test_fused_backward_equals_the_other(case, sides, generator, monkeypatch):
    """At the fewest multiply-adds that a product of all tokens allows."""
    sizes = {**ORDERS, "shorter x": (400, 60, 60, 3, 60), "shorter g": (400, 60, 60, 60, 3)}
    n, in_, out, r_in, r_out = sizes[case]
    u = orthogonal(in_, generator)[:r_in] if sides in ("both", "in") else None
    v = orthogonal(out, generator)[:r_out] if sides in ("both", "out") else None
    g = torch.randn(2, n // 2, out, generator=generator, dtype=torch.float64)
    x = torch.randn(2, n // 2, in_, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, in_, generator=generator, dtype=torch.float64)
    r_in, r_out = in_ if u is None else r_in, out if v is None else r_out
    for asked in ((x, weight), (x, None), (None, weight)):
        rest = [u, v, 20, [r_out, r_in], torch.float64, torch.float32]
        threshold = torch.full((1,), torch.nan)
        monkeypatch.undo()
        wanted = _gradient.backward(g, *asked, *rest)
        monkeypatch.setattr(_gradient, "has_kernel", lambda name, tensor: True)
        with count_flops() as counter:
            got = _gradient.backward(g, *asked, *rest, threshold)
        for one, other in zip(got, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.shape == other.shape and one.dtype == other.dtype
                torch.testing.assert_close(one.to_dense(), other.to_dense())
        assert threshold.isnan().all() == (asked[0] is None)
        rotations = []
        for v_first, u_first in itertools.product({False, v is not None}, {False, u is not None}):
            rows, cols = r_out if v_first else out, r_in if u_first else in_
            total = n * (out * r_out * v_first + in_ * r_in * u_first + rows * cols)
            by_v = r_out * rows if v is not None and not v_first else 0
            by_u = r_in * cols if u is not None and not u_first else 0
            rotations.append(
                total
                + min(
                    by_v * cols + by_u * (r_out if by_v else rows),
                    by_u * rows + by_v * (r_in if by_u else cols),
                )
            )
        cost = n * out * in_ * (asked[1] is not None) + min(rotations) * (asked[0] is not None)
        assert counter.get_total_flops() == 2 * cost


def test_forward_costs_what_linear_costs(generator):
    linear = nn.Linear(64, 96)
    layer = SparseGradLinear.from_linear(
        linear, make_basis("full", 64, 96, generator, torch.float32)
    )
    x = torch.randn(50, 64, generator=generator)
    with FlopCounterMode(display=False) as ours:
        layer(x)
    with FlopCounterMode(display=False) as peer:
        linear(x)
    assert ours.get_total_flops() == peer.get_total_flops()


def test_zero_tokens_cost_nothing(generator):
    if _library.is_sync_free(torch.empty(0)):
        pytest.skip("these kernels skip zero tokens by themselves: no shape shows it")
    basis = make_basis("full", 64, 96, generator, torch.float32)
    layer = SparseGradLinear.from_linear(nn.Linear(64, 96), basis)
    x = torch.randn(100, 64, generator=generator, requires_grad=True)
    g = torch.randn(100, 96, generator=generator)
    g[10:] = 0
    y = layer(x)
    with count_flops() as counter:
        y.backward(g)
    per_token = 96 * 64 + (96 * 96 + 64 * 64 + 96 * 64)  # grad input, and the rotation
    assert counter.get_total_flops() == 2 * 10 * per_token
    assert (x.grad[10:] == 0).all()


@pytest.mark.parametrize("kind", BASES)
def test_keeps_for_backward_what_linear_keeps(kind, generator):
    basis = make_basis(kind, 16, 24, generator, torch.float32)
    layer = SparseGradLinear.from_linear(nn.Linear(16, 24), basis)
    x = torch.randn(10, 16, generator=generator, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in [x, layer.weight, *layer.buffers()]}
    assert {t.data_ptr() for t in kept} <= own
    layer.delta.requires_grad_(False)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", BASES)
def test_compile_fullgraph(space, kind, generator):
    torch._dynamo.reset()  # there is a limit to how often it compiles one function
    linear, x, g = problem(generator)
    eager = SparseGradLinear.from_linear(
        linear, make_basis(kind, 7, 11, generator), k=9, weight_space=space
    )
    inner = copy.deepcopy(eager)
    compiled = torch.compile(inner, fullgraph=True)
    optimizers = [SparseAdam(m.parameters(), lr=0.05) for m in (eager, inner)]
    for _ in range(3):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for module, value, optimizer in zip((eager, compiled), inputs, optimizers, strict=True):
            optimizer.zero_grad()
            module(value).backward(g)
            optimizer.step()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        assert sparse_parameter(inner).grad.layout is torch.sparse_coo
    assert not torch.equal(inner.dense_weight(), linear.weight)
    torch.testing.assert_close(inner.dense_weight(), eager.dense_weight())
    torch.testing.assert_close(inner.bias, eager.bias)


# Of a weight in one dtype with delta, gradient and moments in another.
MIXED = [(torch.float64, torch.bfloat16), (torch.float32, torch.bfloat16)]
MIXED += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("dtype", "delta_dtype"), MIXED)
@pytest.mark.parametrize("kind", BASES)
def test_delta_dtype(kind, dtype, delta_dtype, generator):
    check_delta_dtype(kind, dtype, delta_dtype, False, generator)


@pytest.mark.parametrize("kind", BASES)
def test_delta_dtype_compiled(kind, generator):
    torch._dynamo.reset()
    check_delta_dtype(kind, torch.float32, torch.bfloat16, True, generator)


def check_delta_dtype(kind, dtype, delta_dtype, compiled, generator):
    linear, x, g = problem(generator)
    linear.to(dtype)
    layer = SparseGradLinear.from_linear(
        linear, make_basis(kind, 7, 11, generator), k=9, delta_dtype=delta_dtype
    )
    module = torch.compile(layer, fullgraph=True) if compiled else layer
    optimizer = SparseAdam(layer.parameters(), lr=0.05)
    peer = nn.Parameter(torch.zeros(layer.delta.shape, dtype=delta_dtype))
    peers_optimizer = SparseAdam([peer], lr=0.05)
    for _ in range(3):
        before, used = layer.dense_weight(), layer.bias.detach().clone()
        optimizer.zero_grad()
        y = module(x.to(dtype))
        torch.testing.assert_close(y, nn.functional.linear(x.to(dtype), before, used))
        y.backward(g.to(dtype))
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        peer.grad = layer.delta.grad.clone()
        peers_optimizer.step()
        state = optimizer.state[layer.delta]
        found = {t.dtype for t in (layer.delta, layer.delta.grad, *list(state.values())[1:])}
        assert found == {delta_dtype}
        # What the optimizer makes is folded with no digit of it lost, in the weight's.
        update = peer.detach().double()
        peer.data.zero_()
        assert torch.count_nonzero(update) == torch.count_nonzero(layer.delta.grad.to_dense()) > 0
        update = update if layer.u is None else update @ layer.u.double()
        update = update if layer.v is None else layer.v.double().T @ update
        wanted = before.double() + update
        assert layer.weight.dtype == dtype
        size = 4 * torch.finfo(dtype).eps * wanted.abs().max()
        torch.testing.assert_close(layer.weight.detach().double(), wanted, rtol=0, atol=size.item())
        assert not layer.delta.any()


def test_delta_dtype_stays(generator):
    """Whatever dtype the layer is moved to, and whoever copies it; the optimizer keeps its hold."""
    linear, x, g = problem(generator)
    layer = SparseGradLinear.from_linear(linear.float(), k=9, delta_dtype=torch.bfloat16)
    delta = layer.delta
    optimizer = SparseAdam([delta], lr=0.05)  # torch's own could not go on with the bias
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.delta is delta
        optimizer.zero_grad()
        layer(x.to(dtype)).backward(g.to(dtype))
        optimizer.step()
        assert layer.weight.dtype == dtype
        copied = copy.deepcopy(layer)
        restored = pickle.loads(pickle.dumps(layer))
        assert torch.equal(copied.weight, restored.weight)
        for one in (layer, copied, restored):
            assert one.delta.dtype == one.delta_dtype == torch.bfloat16
    optimizer.zero_grad()
    layer(x.float()).backward(g.float())
    layer.double()
    assert delta.grad.dtype == torch.bfloat16
    optimizer.step()
    plain = SparseGradLinear(7, 11)
    assert plain.delta_dtype is None
    assert plain.double().delta.dtype == torch.float64


@pytest.mark.parametrize("make", [SparseGradLinear, None], ids=["layer", "config"])
def test_delta_dtype_refused(make):
    make = functools.partial(make, 7, 11) if make else SparseGradConfig
    for dtype in (torch.float16, torch.int32, "bfloat16"):
        with pytest.raises(ValueError, match=f"delta_dtype must be None or one of .* {dtype!r}"):
            make(delta_dtype=dtype)
    with pytest.raises(ValueError, match="delta_dtype is for the original space"):
        make(delta_dtype=torch.bfloat16, weight_space="transformed")


@pytest.mark.parametrize("space", SPACES)
def test_trains_after_inference_under_autocast(space, generator):
    basis = make_basis("full", 16, 24, generator, torch.float32)
    layer = SparseGradLinear(16, 24, basis, k=30, weight_space=space)
    x = torch.randn(20, 16, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        layer(x).float().square().sum().backward()
    assert sparse_parameter(layer).grad._nnz() == 30


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", BASES)
def test_autocast(space, kind, generator):
    linear = nn.Linear(16, 24)
    basis = make_basis(kind, 16, 24, generator, torch.float32)
    layer = SparseGradLinear.from_linear(linear, basis, k=300, weight_space=space)
    x = torch.randn(20, 16, generator=generator, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()  # also inside the context
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == layer.bias.grad.dtype == torch.float32
    gradient = sparse_parameter(layer).grad.coalesce()
    assert gradient.dtype == torch.float32
    # Fold, in the next forward, in full precision although autocast is on.
    SparseAdam(layer.parameters(), lr=1e-3).step()
    expected = copy.deepcopy(layer).dense_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert torch.equal(layer.dense_weight(), expected)
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, generator):
    linear, x, g = problem(generator)
    basis = make_basis("full", 7, 11, generator)
    layers = [SparseGradLinear.from_linear(linear, basis, k=9) for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    layers[0](inputs[0]).backward(g)
    checkpoint(layers[1], inputs[1], use_reentrant=reentrant).backward(g)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(layers[0].delta.grad.to_dense(), layers[1].delta.grad.to_dense())


def stepped(generator, kind="full", space="original"):
    """A layer with an update that is not yet folded, as others' optimizers leave it; its weight."""
    linear, x, g = problem(generator)
    layer = SparseGradLinear.from_linear(
        linear, make_basis(kind, 7, 11, generator), k=9, weight_space=space
    )
    layer(x).backward(g)
    torch.optim.SparseAdam([sparse_parameter(layer)], lr=0.1).step()
    wanted = linear.weight.detach().clone()
    if layer.delta is not None:
        assert layer.delta.abs().sum() > 0
        update = layer.delta.detach()
        update = update if layer.u is None else update @ layer.u
        wanted += update if layer.v is None else layer.v.T @ update
    else:
        wanted = copy.deepcopy(layer).dense_weight()
    return layer, wanted, x


READERS = {
    "forward": lambda layer, x: (layer(x), layer)[1],
    "weight": lambda layer, x: (layer.weight, layer)[1],
    "state_dict": lambda layer, x: (layer.state_dict(), layer)[1],
    "eval": lambda layer, x: layer.eval(),
    "deepcopy": lambda layer, x: copy.deepcopy(layer),
    "copy": lambda layer, x: copy.copy(layer),
    "pickle": lambda layer, x: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer, x: layer.to(torch.float64),
    "fold": lambda layer, x: (layer.fold(), layer)[1],
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_folded_weight(kind, reader, generator):
    layer, wanted, x = stepped(generator, kind)
    read = READERS[reader](layer, x)
    torch.testing.assert_close(read._parameters["weight"].detach(), wanted)
    assert (read.delta == 0).all()
    torch.testing.assert_close(read.to_linear().weight.detach(), wanted)
    assert read.k == layer.k


def test_folds_once(generator):
    layer, wanted, _ = stepped(generator)
    for _ in range(3):
        layer.fold()
        torch.testing.assert_close(layer.weight.detach(), wanted)


def test_forward_in_inference_mode_folds(generator):
    layer, wanted, x = stepped(generator)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, wanted, layer.bias).detach())
    torch.testing.assert_close(layer.weight.detach(), wanted)
    layer(x).sum().backward()


@pytest.mark.parametrize(
    "make", [torch.optim.SparseAdam, lambda p, lr: torch.optim.SGD(p, lr=lr)], ids=["adam", "sgd"]
)
def test_foreign_optimizers(make, generator):
    linear, x, g = problem(generator)
    basis = make_basis("full", 7, 11, generator)
    layer = SparseGradLinear.from_linear(linear, basis, k=9)
    optimizer = make([layer.delta], lr=0.1)
    for _ in range(2):
        layer(x).backward(g)
        optimizer.step()
        optimizer.zero_grad()
    assert layer.delta.abs().sum() > 0
    assert (layer.weight - linear.weight).abs().max() > 0.01
    assert (layer.delta == 0).all()


def test_dense_write_into_delta_is_folded(generator):
    linear, _, _ = problem(generator)
    basis = make_basis("truncated", 7, 11, generator)
    layer = SparseGradLinear.from_linear(linear, basis, k=1)
    update = torch.randn(layer.delta.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.delta.copy_(update)
    torch.testing.assert_close(
        layer.weight.detach(), linear.weight.detach() + basis.v.T @ update @ basis.u
    )


def test_second_backward_before_the_step_adds_up(generator):
    linear, x, g = problem(generator)
    layer = SparseGradLinear.from_linear(linear, make_basis("full", 7, 11, generator), k=9)
    parts = []
    for scale in (1.0, -0.3):
        layer.zero_grad()
        layer(x * scale).backward(g)
        parts.append(layer.delta.grad.to_dense())
    layer.zero_grad()
    for scale in (1.0, -0.3):
        layer(x * scale).backward(g)
    torch.testing.assert_close(layer.delta.grad.to_dense(), parts[0] + parts[1])


def test_backward_after_the_weight_changed_is_an_error(generator):
    layer, _, x = stepped(generator)
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.delta[0, 0] = 1.0
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_state_dict_is_that_of_a_linear(generator):
    layer, wanted, x = stepped(generator)
    linear = nn.Linear(7, 11).double()
    linear.load_state_dict(layer.state_dict())
    torch.testing.assert_close(linear.weight.detach(), wanted)
    torch.testing.assert_close(linear(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("assign", [False, True])
def test_loads_a_linear_and_drops_what_was_pending(assign, generator):
    layer, _, x = stepped(generator)
    linear = nn.Linear(7, 11).double()
    result = layer.load_state_dict(linear.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(layer(x), linear(x))
    assert not layer.weight.requires_grad
    assert layer.delta.requires_grad


@pytest.mark.parametrize(
    ("kind", "factors"), [("truncated", {"u", "v"}), ("in", {"u"}), ("out truncated", {"v"})]
)
def test_transformed_state_dict_has_the_basis(kind, factors, generator):
    layer, wanted, x = stepped(generator, kind, "transformed")
    assert factors == {"u", "v"} & set(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = SparseGradLinear(
        7,
        11,
        make_basis(kind, 7, 11, generator),
        k=9,
        weight_space="transformed",
        dtype=torch.float64,
    )
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(other.dense_weight(), wanted)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{min(factors)}"):
        other.load_state_dict({"weight": layer.weight, "bias": layer.bias})


def test_layers_share_a_basis_through_moves_and_copies(generator):
    basis = make_basis("full", 8, 8, generator, torch.float32)
    model = nn.Sequential(*(SparseGradLinear.from_linear(nn.Linear(8, 8), basis) for _ in range(2)))
    assert model[0].basis is model[1].basis is basis
    for moved in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        assert moved[0].basis is moved[1].basis
        assert moved[0].basis.u.data_ptr() == moved[1].basis.u.data_ptr()
    assert model[0].basis.u.dtype == torch.float64


def test_construction(generator):
    layer = SparseGradLinear(20, 30, bias=False)
    assert layer.bias is None
    assert layer.k == 6
    assert layer(torch.randn(2, 20)).shape == (2, 30)
    assert layer.to_linear().bias is None
    assert "in_features=20, out_features=30, bias=False, k=6" in repr(layer)
    frozen = nn.Linear(4, 4)
    frozen.bias.requires_grad_(False)
    converted = SparseGradLinear.from_linear(frozen.eval())
    assert not converted.training
    assert not converted.bias.requires_grad
    assert converted.k == 1
    before = frozen.weight.clone()
    with torch.no_grad():
        converted.delta.fill_(1.0)
    converted.fold()
    assert torch.equal(frozen.weight, before)


def test_without_input_gradient_and_when_frozen(generator):
    linear, x, g = problem(generator)
    layer = SparseGradLinear.from_linear(linear, make_basis("full", 7, 11, generator), k=9)
    layer(x).backward(g)
    assert layer.delta.grad._nnz() == 9
    layer.delta.requires_grad_(False)
    layer.zero_grad()
    x.requires_grad_()
    layer(x).backward(g)
    assert layer.delta.grad is None
    torch.testing.assert_close(x.grad, g @ linear.weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_step_is_seen(value, generator):
    linear, x, g = problem(generator)
    layer = SparseGradLinear.from_linear(linear, k=3)
    g[0, 0, 0] = value
    layer(x).backward(g)
    assert not layer.delta.grad._values().isfinite().all()


def test_empty_batch(generator):
    layer = SparseGradLinear(7, 11, make_basis("full", 7, 11, generator, torch.float32), k=9)
    x = torch.empty(0, 3, 7, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 3, 11)
    assert x.grad.shape == x.shape
    assert (layer.delta.grad.to_dense() == 0).all()


def test_bad_input(generator):
    basis = make_basis("full", 7, 11, generator, torch.float32)
    with pytest.raises(ValueError, match="its u has 7 columns, the layer needs 8"):
        SparseGradLinear(8, 11, basis)
    with pytest.raises(ValueError, match="its v has 11 columns, the layer needs 12"):
        SparseGradLinear(7, 12, basis)
    with pytest.raises(TypeError, match="basis must be a Basis or None, got Tensor"):
        SparseGradLinear(7, 11, basis.u)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got 0"):
        SparseGradLinear(7, 11, density=0)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        SparseGradLinear(7, 11, k=0)
    with pytest.raises(TypeError, match="k must be an int or None, got float"):
        SparseGradLinear(7, 11, k=2.0)
    with pytest.raises(ValueError, match="weight_space must be"):
        SparseGradLinear(7, 11, weight_space="other")
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv1d"):
        SparseGradLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match=r"input must have 7 features.* got shape \(2, 6\)"):
        SparseGradLinear(7, 11)(torch.zeros(2, 6))


def test_opcheck(generator):
    linear, x, _ = problem(generator)
    basis = make_basis("full", 7, 11, generator)
    weight, bias, delta = linear.weight.detach(), linear.bias.detach(), torch.zeros(11, 7).double()
    args = (x, weight, bias, delta, basis.u, basis.v, 9, None)
    torch.library.opcheck(OPS._linear.default, args)
    torch.library.opcheck(OPS._linear.default, (x.requires_grad_(), *args[1:]))
    delta = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    for update in (delta, delta.bfloat16()):
        args = (weight, update, basis.u, basis.v, 9, None)
        torch.library.opcheck(OPS._fold_delta_.default, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_small_updates(dtype, generator):
    linear = nn.Linear(32, 48).to(dtype)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    nearest, stochastic = (
        SparseGradLinear.from_linear(linear, k=32 * 48, stochastic_rounding=stochastic)
        for stochastic in (False, True)
    )
    step = torch.finfo(dtype).eps / 8
    for layer in (nearest, stochastic):
        for _ in range(16):
            with torch.no_grad():
                layer.delta.fill_(step)
            layer.fold()
    assert (nearest.weight == 1).all()
    mean = stochastic.weight.double().mean() - 1
    assert mean == pytest.approx(16 * step, rel=0.25)  # 16 x 1,536 coins: 4 standard deviations
    again = pickle.loads(pickle.dumps(stochastic))
    assert torch.equal(again.seed, stochastic.seed)
    assert not stochastic.float().stochastic_rounding


def test_seed_moves_on_at_each_fold(generator):
    layer = SparseGradLinear(4, 3, stochastic_rounding=True, dtype=torch.bfloat16)
    for value in (1.0, 0.0):
        before = layer.seed.clone()
        with torch.no_grad():
            layer.delta.fill_(value)
        layer.fold()
        assert not torch.equal(layer.seed, before)


def test_stochastic_rounding_needs_half_precision():
    with pytest.raises(ValueError, match="stochastic_rounding is for bfloat16 or float16"):
        SparseGradLinear(4, 3, stochastic_rounding=True)
    with pytest.raises(ValueError, match="in the transformed space"):
        SparseGradLinear(
            4, 3, weight_space="transformed", stochastic_rounding=True, dtype=torch.bfloat16
        )
