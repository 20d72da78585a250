from __future__ import annotations

import pytest
import torch

from cases import DTYPES, INTERPRETING, strided_views
from sparsegrad_kernels.ops import sparse_adam_, topk_coo
from sparsegrad_kernels.ops._rounding import round_stochastically

OP = torch.ops.sparsegrad_kernels.sparse_adam_.default
HYPER = (0.01, 0.9, 0.99, 1e-6)
# Of one step: the parameter is rounded to its dtype.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def oracle(param, exp_avg, exp_avg_sq, indices, values, step, lr, beta1, beta2, eps):
    """Entry by entry, in Python's float64."""
    tensors = [t.double().clone() for t in (param, exp_avg, exp_avg_sq)]
    p, m, v = tensors
    for (i, j), g in zip(indices.T.tolist(), values.double().tolist(), strict=True):
        m[i, j] = beta1 * m[i, j] + (1 - beta1) * g
        v[i, j] = beta2 * v[i, j] + (1 - beta2) * g * g
        size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        p[i, j] -= size * m[i, j] / (v[i, j] ** 0.5 + eps)
    return tensors


def state(shape, dtype, generator):
    param = torch.randn(*shape, generator=generator).to(dtype)
    exp_avg = torch.randn(*shape, generator=generator).to(dtype)
    return param, exp_avg, torch.rand(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 64)])
@pytest.mark.parametrize("step", [1, 17])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_equals_oracle(dtype, shape, step, layout, generator):
    tensors = [strided_views(t)[layout] for t in state(shape, dtype, generator)]
    indices, values = topk_coo(torch.randn(*shape, generator=generator).to(dtype), 20)
    wanted = oracle(*tensors, indices, values, step, *HYPER)
    before = [t.clone() for t in tensors]
    sparse_adam_(*tensors, indices, values, step, *HYPER)
    untouched = torch.ones(shape, dtype=torch.bool)
    untouched[indices[0], indices[1]] = False
    for got, right, old in zip(tensors, wanted, before, strict=True):
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), right, rtol=limit, atol=limit)
        assert torch.equal(got[untouched], old[untouched])


def test_equals_torch(generator):
    param = torch.nn.Parameter(torch.randn(20, 30, generator=generator))
    ours, exp_avg, exp_avg_sq = param.detach().clone(), torch.zeros(20, 30), torch.zeros(20, 30)
    lr, *betas, eps = HYPER
    peer = torch.optim.SparseAdam([param], lr=lr, betas=tuple(betas), eps=eps)
    for step in range(1, 30):
        indices, values = topk_coo(torch.randn(20, 30, generator=generator), 25)
        param.grad = torch.sparse_coo_tensor(indices, values, (20, 30), check_invariants=True)
        peer.step()
        sparse_adam_(ours, exp_avg, exp_avg_sq, indices, values, step, *HYPER)
    torch.testing.assert_close(ours, param.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("step", [1, 17, 10**6])
def test_step_and_lr_on_the_device(dtype, step_dtype, step, generator):
    lr, *rest = HYPER
    tensors = [strided_views(t)["sliced"] for t in state((7, 5), dtype, generator)]
    indices, values = topk_coo(torch.randn(7, 5, generator=generator).to(dtype), 20)
    wanted = oracle(*tensors, indices, values, step, *HYPER)
    limit = max(TOLERANCE[dtype], 1e-12)
    steps = torch.tensor(step, dtype=step_dtype), torch.tensor([step], dtype=step_dtype)
    rates = lr, torch.tensor(lr, dtype=torch.float64), torch.tensor([lr], dtype=torch.float64)
    for now in (step, *steps):
        for rate in rates:
            copies = [t.clone() for t in tensors]
            sparse_adam_(*copies, indices, values, now, rate, *rest)
            for got, right in zip(copies, wanted, strict=True):
                torch.testing.assert_close(got.double(), right, rtol=limit, atol=limit)
    assert steps[0].item() == steps[1].item() == step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_device", [False, True], ids=["int", "tensor"])
def test_second_moment_of_16_bits_follows(dtype, on_device, generator):
    """Steps of a thousandth, which rounding to nearest drops, up and down."""
    shape, n_steps = (16, 48), 12
    indices = torch.ones(shape).nonzero().T
    for before, square in ((1.0, 0.25), (0.25, 1.0)):
        moment = torch.full(shape, before, dtype=dtype)
        others = torch.zeros(2, *shape, dtype=dtype)
        grad = torch.full((moment.numel(),), square**0.5, dtype=dtype)
        for step in range(1, n_steps + 1):
            number = torch.tensor(step) if on_device else step
            sparse_adam_(*others, moment, indices, grad, number, 0.01, 0.9, 0.999, 1e-6)
        wanted = square + (before - square) * 0.999**n_steps
        # Of 768 entries; the standard deviation of one is below half a gap for each step's root.
        gap = torch.finfo(dtype).eps * max(before, wanted) / 2
        limit = 5 * (n_steps / moment.numel()) ** 0.5 * gap
        assert moment.double().mean().item() == pytest.approx(wanted, abs=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_moment_of_16_bits_is_reproducible(dtype, generator):
    """The same bits for the same step, which are those of the reference's rounding."""
    shape = (9, 31)
    before = torch.rand(*shape, generator=generator).to(dtype)
    indices, values = topk_coo(torch.randn(*shape, generator=generator).to(dtype), 200)
    at = indices[0], indices[1]
    position = indices[0] * shape[1] + indices[1]
    second = before.float() * 0.75  # exactly
    found = []
    for step in (3, 3, 4):
        moment = strided_views(before)["transposed"].clone()
        others = torch.zeros(2, *shape, dtype=dtype)
        sparse_adam_(*others, moment, indices, values * 0, step, 0.01, 0.9, 0.75, 1e-6)
        seed = torch.tensor([step])
        wanted = round_stochastically(second[at], before[at], seed, position)
        assert torch.equal(moment[at], wanted)
        found.append(moment)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_device", [False, True], ids=["int", "tensor"])
def test_no_first_moment(dtype, on_device, generator):
    """Where beta1 is 0 it is the gradient, and there need be none."""
    param, first, second = state((7, 40), dtype, generator)
    indices, values = topk_coo(torch.randn(7, 40, generator=generator).to(dtype), 150)
    hyper = (0.01, 0.0, 0.99, 1e-6)
    wanted = oracle(param, first, second, indices, values, 5, *hyper)
    peers = [t.clone() for t in (param, first, second)]
    step = torch.tensor(5) if on_device else 5
    sparse_adam_(*peers, indices, values, step, *hyper)
    sparse_adam_(param, None, second, indices, values, step, *hyper)
    assert torch.equal(param, peers[0])
    assert torch.equal(second, peers[2])
    torch.testing.assert_close(
        param.double(), wanted[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("beta2", [0.0, 0.999, 0.999999])
def test_bias_correction_keeps_its_digits(beta2, generator):
    tensors = [torch.zeros(3, 4, dtype=torch.float64) for _ in range(3)]
    indices, values = topk_coo(torch.randn(3, 4, generator=generator).double(), 5)
    wanted = oracle(*tensors, indices, values, 1, 0.1, 0.0, beta2, 0.0)
    sparse_adam_(*tensors, indices, values, torch.tensor(1), 0.1, 0.0, beta2, 0.0)
    torch.testing.assert_close(tensors[0], wanted[0], rtol=1e-9, atol=0)


def test_nothing_to_do():
    tensors = [torch.ones(0, 3) for _ in range(3)]
    sparse_adam_(*tensors, torch.empty(2, 0, dtype=torch.int64), torch.empty(0), 1, *HYPER)


def test_bad_input():
    p = [torch.zeros(2, 3) for _ in range(3)]
    i, v = torch.tensor([[0], [2]]), torch.ones(1)
    with pytest.raises(ValueError, match=r"exp_avg must have shape \(2, 3\) \(that of param\)"):
        sparse_adam_(p[0], torch.zeros(3, 2), p[2], i, v, 1, *HYPER)
    with pytest.raises(TypeError, match="exp_avg must be a torch.Tensor, got NoneType"):
        sparse_adam_(p[0], None, p[2], i, v, 1, *HYPER)
    with pytest.raises(TypeError, match="indices must be int64, got torch.int32"):
        sparse_adam_(*p, i.int(), v, 1, *HYPER)
    with pytest.raises(ValueError, match=r"indices must have shape \(2, 3\)"):
        sparse_adam_(*p, i, torch.ones(3), 1, *HYPER)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 2\) x \[0, 3\), got rows 0..0"):
        sparse_adam_(*p, torch.tensor([[0], [3]]), v, 1, *HYPER)
    with pytest.raises(ValueError, match=r"indices must lie in"):
        sparse_adam_(*p, torch.tensor([[-1], [0]]), v, 1, *HYPER)
    with pytest.raises(TypeError, match="values must have the dtype of param"):
        sparse_adam_(*p, i, v.double(), 1, *HYPER)
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        sparse_adam_(*p, i, v, 0, *HYPER)
    with pytest.raises(ValueError, match=r"beta2 must lie in \[0, 1\), got 1.0"):
        sparse_adam_(*p, i, v, 1, 0.1, 0.9, 1.0, 1e-8)
    with pytest.raises(ValueError, match="lr must not be negative, got nan"):
        sparse_adam_(*p, i, v, 1, float("nan"), 0.9, 0.9, 1e-8)
    rest = HYPER[1:]
    with pytest.raises(ValueError, match=r"step must hold one number, got shape \(2,\)"):
        sparse_adam_(*p, i, v, torch.ones(2), 0.1, *rest)
    with pytest.raises(TypeError, match=r"step must have one of the dtypes .* got torch.bool"):
        sparse_adam_(*p, i, v, torch.tensor(True), 0.1, *rest)
    with pytest.raises(TypeError, match=r"lr must have one of the dtypes .* got torch.int64"):
        sparse_adam_(*p, i, v, 1, torch.tensor(1), *rest)
    with pytest.raises(ValueError, match="step must be on the device of param, cpu, got meta"):
        sparse_adam_(*p, i, v, torch.ones((), device="meta"), 0.1, *rest)
    with pytest.raises(ValueError, match="indices must lie in"):
        sparse_adam_(*p, torch.tensor([[0], [3]]), v, torch.tensor(1), 0.1, *rest)
    assert all((t == 0).all() for t in p)


@pytest.mark.skipif(INTERPRETING, reason="a Triton kernel writes behind autograd's back")
def test_what_autograd_refuses_to_have_written_is_left(generator):
    leaf = torch.zeros(4, 4, requires_grad=True)
    moments = torch.zeros(4, 4), torch.zeros(4, 4)
    entries = topk_coo(torch.randn(4, 4, generator=generator), 3)
    with pytest.raises(RuntimeError, match=r"in.place"):
        sparse_adam_(leaf, *moments, *entries, 1, 1e-3, 0.9, 0.999, 1e-8)
    assert not any(t.detach().any() for t in (leaf, *moments))
    with torch.no_grad():
        sparse_adam_(leaf, *moments, *entries, 1, 1e-3, 0.9, 0.999, 1e-8)
    assert leaf.detach().count_nonzero() == 3


def test_opcheck(generator):
    tensors = state((5, 6), torch.float32, generator)
    indices, values = topk_coo(torch.randn(5, 6, generator=generator), 7)
    torch.library.opcheck(OP, (*tensors, indices, values, 3, *HYPER))
    lr, *rest = HYPER
    args = (*tensors, indices, values, torch.tensor(3.0), torch.tensor(lr), *rest)
    op_tensor_step = torch.ops.sparsegrad_kernels._sparse_adam_tensor_step_.default
    torch.library.opcheck(op_tensor_step, args)
    param, _, second = tensors
    without = (param, None, second, indices, values)
    torch.library.opcheck(OP, (*without, 3, lr, 0.0, *rest[1:]))
    torch.library.opcheck(op_tensor_step, (*without, *args[5:7], 0.0, *rest[1:]))


def test_compile(generator):
    tensors = state((5, 6), torch.float32, generator)
    copies = [t.clone() for t in tensors]
    indices, values = topk_coo(torch.randn(5, 6, generator=generator), 7)

    def use(p, m, v):
        sparse_adam_(p, m, v, indices, values, 3, *HYPER)
        return p + 1

    torch.testing.assert_close(torch.compile(use, fullgraph=True)(*tensors), use(*copies))
    torch.testing.assert_close(tensors[0], copies[0])
