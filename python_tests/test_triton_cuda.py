"""The Triton kernels on a GPU: against the reference, without a sync, and in CUDA graphs.

With SPARSEGRAD_BACKEND=triton on a machine with a GPU. The references run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cases import DTYPES, SHAPES, TOLERANCE, orthogonal, sparse_matrix, strided_views
from sparsegrad_kernels import backends, ops


def _missing() -> str:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if backends()["cuda"].loaded or not backends()["triton"].loaded:
        return f"Triton serves no CUDA tensors here: {backends()['triton'].reason}"
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# [tokens, out_features, in_features]: one block and less; many blocks, none of them full.
sizes = pytest.mark.parametrize("size", [(37, 21, 19), (515, 1037, 390)], ids=["small", "large"])
Size = tuple[int, int, int]


@pytest.fixture
def no_sync():
    """Waiting for the device is an error."""

    class NoSync:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *exception: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    return NoSync()


def tensors(value: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def assert_same(actual: object, expected: object) -> None:
    """Bit by bit: NaN equals NaN."""
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_close(actual: Tensor, oracle: Tensor, scale: Tensor) -> None:
    info = torch.finfo(actual.dtype)
    limit = TOLERANCE[actual.dtype] * scale + info.smallest_normal * info.eps
    error = (actual.cpu().double() - oracle).abs()
    assert bool((error <= limit).all()), f"error {(error / limit).max()} times what is allowed"


def integers(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Small, so that products are exact in every type; a third of the rows is zero."""
    values = torch.randint(-1, 2, (rows, cols), generator=generator)
    return (values * (torch.rand(rows, 1, generator=generator) < 0.67)).to(dtype)


def distinct_entries(rows: int, cols: int, k: int, generator: torch.Generator) -> Tensor:
    linear = torch.randperm(rows * cols, generator=generator)[:k].sort().values
    return torch.stack([linear // cols, linear % cols])


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (1031, 777)], ids=str)
def test_detection_and_selection_equal_the_reference(shape, dtype, generator, no_sync):
    a = sparse_matrix(*shape, dtype, generator)
    k = max(1, a.numel() // 50)
    for view in strided_views(a.cuda()).values():
        for tol in (0.0, 0.5):
            assert_same(ops.nonzero_rows_cols(view, tol), ops.nonzero_rows_cols(a, tol))
            assert_same(ops.compact_indices(view, tol), ops.compact_indices(a, tol))
        assert_same(ops.topk_coo(view, k), ops.topk_coo(a, k))
        with no_sync:
            ops.compact_indices(view)
            ops.topk_coo(view, k)


def test_selection_of_ties_and_of_what_is_no_number(generator):
    c = torch.randint(-2, 3, (301, 407), generator=generator).float()
    c[5, 7], c[300, 0], c[2, 2] = torch.nan, torch.inf, -torch.inf
    for k in (1, 2, 3, 4, 1000, c.numel() - 1, c.numel()):
        assert_same(ops.topk_coo(c.cuda(), k), ops.topk_coo(c, k))


@dtypes
@sizes
def test_products_agree_with_float64(size, dtype, generator, no_sync):
    tokens, n_out, n_in = size
    a = sparse_matrix(tokens, n_out, dtype, generator)
    b = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64).to(dtype)
    oracle, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for left in strided_views(a.cuda()).values():
        for right in strided_views(b.cuda()).values():
            assert_close(ops.sparse_dense_mm(left, right), oracle, scale)
    indices, values = ops.sparse_dense_mm_coo(a.cuda(), b.cuda())
    assert_same(indices, ops.sparse_dense_mm_coo(a, b)[0])
    at = tuple(indices.cpu())
    assert_close(values, oracle[at], scale[at])
    with no_sync:
        ops.sparse_dense_mm(a.cuda(), b.cuda())


@dtypes
@sizes
def test_grad_weight_topk_equals_the_reference(size, dtype, generator, no_sync):
    tokens, n_out, n_in = size
    g = integers(min(tokens, 200), n_out, dtype, generator)
    x = integers(min(tokens, 200), n_in, dtype, generator)
    expected = ops.grad_weight_topk(g, x, 100)
    for left in strided_views(g.cuda()).values():
        for right in strided_views(x.cuda()).values():
            assert_same(ops.grad_weight_topk(left, right, 100), expected)
    g, x = g.cuda(), x.cuda()
    with no_sync:
        ops.grad_weight_topk(g, x, 100)


def adam_arguments(size: Size, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    _, n_out, n_in = size
    indices = distinct_entries(n_out, n_in, n_out * n_in // 20, generator)
    param, exp_avg, exp_avg_sq = torch.randn(3, n_out, n_in, generator=generator).to(dtype)
    values = torch.randn(indices.shape[1], generator=generator).to(dtype)
    return [param, exp_avg, exp_avg_sq.square(), indices, values]


@dtypes
@sizes
def test_sparse_adam_agrees_with_float64(size, dtype, generator, no_sync):
    arguments = adam_arguments(size, dtype, generator)
    oracle = [t.double() if t.is_floating_point() else t for t in arguments]
    oracle[:3] = [t.clone() for t in oracle[:3]]
    ops.sparse_adam_(*oracle, 3, 1e-2, 0.9, 0.999, 1e-8)
    on_device = [t.cuda() for t in arguments]
    ops.sparse_adam_(*on_device, 3, 1e-2, 0.9, 0.999, 1e-8)
    for actual, expected, before in zip(on_device[:3], oracle[:3], arguments[:3], strict=True):
        assert_close(actual, expected, expected.abs() + before.double().abs())
    with no_sync:
        ops.sparse_adam_(*on_device, 4, 1e-2, 0.9, 0.999, 1e-8)


def fold_arguments(size: Size, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    _, n_out, n_in = size
    u = orthogonal(n_in, generator, dtype)[: n_in - 3].clone()
    v = orthogonal(n_out, generator, dtype)[: n_out - 2].clone()
    indices = distinct_entries(n_out - 2, n_in - 3, n_out * n_in // 100, generator)
    values = torch.randn(indices.shape[1], generator=generator).to(dtype)
    return [torch.randn(n_out, n_in, generator=generator).to(dtype), u, v, indices, values]


@dtypes
@sizes
def test_fold_agrees_with_float64(size, dtype, generator, no_sync):
    weight, u, v, indices, values = fold_arguments(size, dtype, generator)
    update = torch.zeros(v.shape[0], u.shape[0], dtype=torch.float64)
    update[tuple(indices)] = values.double()
    oracle = weight.double() + v.double().T @ update @ u.double()
    scale = weight.double().abs() + v.double().abs().T @ update.abs() @ u.double().abs()
    arguments = [t.cuda() for t in (weight, u, v, indices, values)]
    ops.fold_(*arguments)
    assert_close(arguments[0], oracle, scale)
    with no_sync:
        ops.fold_(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sides", ["both", "in", "out", "none"])
@pytest.mark.parametrize(
    "shape", [(61, 67, 300), (1037, 390, 40_000), (390, 1037, 40_000), (3072, 768, 23_600)], ids=str
)
def test_fold_gives_the_same_bits_each_time(shape, sides, dtype, generator):
    """A task that does not wait for what it reads shows here, and one that waits for ever."""
    n_out, n_in, n = shape
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype)
    has_u, has_v = sides in ("both", "in"), sides in ("both", "out")
    r_out, r_in = n_out - 2 * has_v, n_in - 3 * has_u
    u, v = (
        (torch.randn(r, size, generator=generator) / size**0.5).to(dtype) if given else None
        for given, r, size in ((has_u, r_in, n_in), (has_v, r_out, n_out))
    )
    # In no order, some twice, a third of them in one column and others in one row.
    indices = torch.stack([torch.randint(r, (n,), generator=generator) for r in (r_out, r_in)])
    indices[1, : n // 3] = 0
    indices[0, n // 2 :: 5] = r_out - 1
    values = torch.randn(n, generator=generator).to(dtype)
    expected = weight.double()
    bases = [None if basis is None else basis.double() for basis in (u, v)]
    ops.fold_(expected, *bases, indices, values.double())
    scale = weight.double().abs()
    ops.fold_(scale, *(b if b is None else b.abs() for b in bases), indices, values.double().abs())

    weight, indices, values = weight.cuda(), indices.cuda(), values.cuda()
    bases = [None if basis is None else basis.cuda() for basis in (u, v)]
    seed = torch.tensor([3], device="cuda") if dtype == torch.bfloat16 else None
    first = weight.clone()
    ops.fold_(first, *bases, indices, values)
    assert_close(first, expected, scale)
    first = weight.clone()
    ops.fold_(first, *bases, indices, values, seed)
    different = torch.zeros(2, dtype=torch.int64, device="cuda")
    streams = torch.cuda.Stream(), torch.cuda.Stream()  # two launches at the same time
    torch.cuda.synchronize()
    for run in range(200):
        with torch.cuda.stream(streams[run % 2]):
            again = weight.clone()
            ops.fold_(again, *bases, indices, values, seed)
            different[run % 2] += (again != first).sum()
    torch.cuda.synchronize()
    assert different.tolist() == [0, 0]


def assert_graph_equals_eager(
    run: Callable[..., object], inputs: list[Tensor], changed: list[Tensor], n_written: int = 0
) -> None:
    """Capture `run(*inputs)`, replay on `changed`: outputs, and the first inputs, are the same."""
    static = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, tunes and allocates what a capture must not
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*static)
    for values in (changed, inputs, changed):
        for tensor, value in zip(static, values, strict=True):
            tensor.copy_(value)
        graph.replay()
        eager = [t.clone() for t in values]
        expected = run(*eager)
        assert_same(out, expected)
        assert_same(static[:n_written], eager[:n_written])


def two(make: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    return [[t.cuda() for t in make()] for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "op", ["compact_indices", "topk_coo", "sparse_dense_mm", "grad_weight_topk"]
)
def test_graph_of_an_operator_follows_its_inputs(op, dtype, generator):
    keeps = iter((0.3, 0.8))

    def make() -> list[Tensor]:
        a = sparse_matrix(515, 390, dtype, generator, next(keeps))
        rows = 515 if op == "grad_weight_topk" else 390
        b = torch.randn(rows, 261, generator=generator).to(dtype)
        return [a] if op in ("compact_indices", "topk_coo") else [a, b]

    k = (500,) if "topk" in op else ()
    assert_graph_equals_eager(lambda *t: getattr(ops, op)(*t, *k), *two(make))


def test_graph_of_the_optimizer_counts_its_steps(generator):
    size = (1, 390, 261)
    steps = iter((1.0, 7.0))

    def make() -> list[Tensor]:
        arguments = adam_arguments(size, torch.float32, generator)
        return [*arguments, torch.tensor(next(steps))]

    def run(*t: Tensor) -> None:
        ops.sparse_adam_(*t, 1e-2, 0.9, 0.999, 1e-8)

    assert_graph_equals_eager(run, *two(make), n_written=3)


@pytest.mark.parametrize("sides", ["both", "in", "out", "none"])
def test_graph_of_fold(sides, generator):
    def make() -> list[Tensor]:
        weight, u, v, indices, values = fold_arguments((1, 390, 261), torch.float32, generator)
        return [weight, indices, values, u, v]

    def run(weight: Tensor, indices: Tensor, values: Tensor, u: Tensor, v: Tensor) -> None:
        given_u, given_v = sides in ("both", "in"), sides in ("both", "out")
        ops.fold_(weight, u if given_u else None, v if given_v else None, indices, values)

    assert_graph_equals_eager(run, *two(make), n_written=1)
