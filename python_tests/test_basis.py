from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Plain, tiny, token_batches
from safetensors.torch import save
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import orthogonal
from sparsegrad_kernels import Basis, SparseGradConfig, fit_basis
from sparsegrad_kernels.basis import RANK_MULTIPLE, _GramHosvd, _TensorlyHosvd
from sparsegrad_kernels.config import find_targets, linear_view, wanted_modes

PLAIN = SparseGradConfig(target_modules=["up", "down"])


def plain_batches(n: int, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(n)]


def gradients(model, batches, config) -> dict[str, list[np.ndarray]]:
    """Per group, by plain autograd."""
    by_group: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss if isinstance(batch, dict) else model(batch)
        loss.backward()
        for target in find_targets(model, config).values():
            gradient = linear_view(target.module, target.module.weight.grad)
            by_group.setdefault(target.group, []).append(gradient.double().numpy().copy())
    return by_group


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.double()


def check_hosvd(basis: Basis, stack: np.ndarray, modes: str = "both") -> None:
    """Against numpy's SVD of the unfoldings of `stack [n, out, in]`."""
    assert (basis.u is not None) == (basis.energy_in is not None) == (modes in ("both", "in"))
    assert (basis.v is not None) == (basis.energy_out is not None) == (modes in ("both", "out"))
    n, out, in_ = stack.shape
    for factor, energy, unfolding in (
        (basis.u, basis.energy_in, stack.transpose(2, 0, 1).reshape(in_, n * out)),
        (basis.v, basis.energy_out, stack.transpose(1, 0, 2).reshape(out, n * in_)),
    ):
        if factor is None:
            continue
        left, singular, _ = np.linalg.svd(unfolding, full_matrices=True)
        wanted = np.zeros(len(left))
        wanted[: len(singular)] = singular**2
        scale = wanted[0]
        assert np.abs(energy.double().numpy() - wanted).max() <= 1e-9 * scale
        factor = factor.double().numpy()
        assert np.abs(factor @ factor.T - np.eye(len(factor))).max() < 1e-9
        # The same subspace wherever the spectrum has a gap: compare projectors.
        for rank in range(1, len(left)):
            if wanted[rank - 1] - wanted[rank] > 1e-3 * scale:
                ours, theirs = factor[:rank], left[:, :rank]
                difference = ours.T @ ours - theirs @ theirs.T
                assert np.abs(difference).max() < 1e-6


@pytest.mark.parametrize("method", ["gram", "tensorly"])
def test_equals_svd_of_the_unfoldings(method, generator):
    model = without_dropout(Plain(3))
    batches = plain_batches(5, generator)
    fitted = fit_basis(model, batches, PLAIN, n_steps=5, method=method, progress=False)
    model.train()
    stacks = gradients(copy.deepcopy(model), batches, PLAIN)
    assert set(fitted) == set(stacks) == {"up", "down"}
    for group, basis in fitted.items():
        assert len(stacks[group]) == 15
        check_hosvd(basis, np.stack(stacks[group]))


@pytest.mark.parametrize("method", ["gram", "tensorly"])
def test_per_layer(method, generator):
    model = without_dropout(Plain(2))
    batches = plain_batches(4, generator)
    config = SparseGradConfig(target_modules=["up"], shared_basis=False)
    fitted = fit_basis(model, batches, config, n_steps=4, method=method, progress=False)
    stacks = gradients(model, batches, config)
    assert set(fitted) == {"blocks.0.up", "blocks.1.up"}
    for name, basis in fitted.items():
        check_hosvd(basis, np.stack(stacks[name]))


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_transformers(model_type, generator):
    model = tiny(model_type).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches = token_batches(3, generator)
    fitted = fit_basis(model, batches, n_steps=3, progress=False)
    # Attention may have its own dropout: the same mode, the same batches.
    stacks = gradients(model, batches, SparseGradConfig())
    for group, basis in fitted.items():
        if model_type == "llama":  # no dropout anywhere: exactly the same gradients
            check_hosvd(basis, np.stack(stacks[group]))
        assert basis.energy_in.sum() == pytest.approx(float(basis.energy_out.sum()))


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 9),
    n=st.integers(1, 6),
    modes=st.sampled_from(["both", "in", "out"]),
    seed=st.integers(0, 2**31),
)
def test_methods_agree(out, in_, n, modes, seed):
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(n, out, in_, generator=generator, dtype=torch.float64)
    wanted = wanted_modes(modes, (out, in_))
    for hosvd in (_GramHosvd(*wanted), _TensorlyHosvd(*wanted)):
        for gradient in stack:
            hosvd.add(gradient)
        check_hosvd(hosvd.basis(torch.float64), stack.numpy(), modes)


def test_gradients_are_streamed(generator):
    """What is kept does not grow with the number of steps."""
    hosvd = _GramHosvd()
    for _ in range(50):
        hosvd.add(torch.randn(6, 4, generator=generator))
    assert {mode: tuple(t.shape) for mode, t in hosvd.grams.items()} == {
        "in": (4, 4),
        "out": (6, 6),
    }
    assert set(vars(hosvd)) == {"grams", "modes"}
    hosvd = _GramHosvd(True, False)
    hosvd.add(torch.randn(6, 4, generator=generator))
    assert set(hosvd.grams) == {"in"}


@pytest.mark.parametrize("modes", ["in", "out", "smaller"])
@pytest.mark.parametrize("method", ["gram", "tensorly"])
def test_one_mode(modes, method, generator):
    """A mode's factor does not depend on whether the other is asked for."""
    model = without_dropout(Plain())
    batches = plain_batches(3, generator)
    both = fit_basis(model, batches, PLAIN, 3, method, progress=False)
    config = SparseGradConfig(target_modules=["up", "down"], modes=modes)
    fitted = fit_basis(model, batches, config, 3, method, progress=False)
    shapes = {target.group: target.shape for target in find_targets(model, config).values()}
    assert shapes == {"up": (12, 8), "down": (8, 12)}
    for group, basis in fitted.items():
        mode = {"up": "in", "down": "out"}[group] if modes == "smaller" else modes
        wanted = both[group].select(mode == "in", mode == "out")
        assert wanted.tensors().keys() == basis.tensors().keys()
        for name, tensor in basis.tensors().items():
            torch.testing.assert_close(tensor, wanted.tensors()[name])


def snapshot(model):
    return (
        {name: t.clone() for name, t in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        torch.get_rng_state(),
    )


def check_unchanged(before, model):
    state, parameters, modes, rng = snapshot(model)
    assert all(torch.equal(state[name], value) for name, value in before[0].items())
    assert all(parameters[name][0] == flag for name, (flag, _) in before[1].items())
    assert all(parameters[name][1] is grad for name, (_, grad) in before[1].items())
    assert modes == before[2]
    assert torch.equal(rng, before[3])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(fails, generator):
    model = Plain(2).double().eval()
    model.norm.train()
    model.head.weight.requires_grad_(False)
    model(plain_batches(1, generator)[0]).backward()
    before = snapshot(model)
    calls = []

    def loss_fn(model, batch):
        calls.append(model.training)
        if fails and len(calls) == 3:
            raise RuntimeError("the user's own")
        assert not any(p.requires_grad for p in model.head.parameters())
        return model(batch)

    if fails:
        with pytest.raises(RuntimeError, match="the user's own"):
            fit_basis(model, plain_batches(4, generator), PLAIN, 4, loss_fn=loss_fn)
    else:
        fit_basis(model, plain_batches(4, generator), PLAIN, 4, loss_fn=loss_fn)
    assert all(calls)
    check_unchanged(before, model)


def test_runs_under_no_grad(generator):
    with torch.no_grad():
        assert fit_basis(Plain().double(), plain_batches(2, generator), PLAIN, 2, progress=False)


def test_starts_the_batches_again(generator):
    batches = plain_batches(2, generator)
    model = without_dropout(Plain())
    twice = fit_basis(model, batches, PLAIN, n_steps=4, progress=False)
    once = fit_basis(model, batches, PLAIN, n_steps=2, progress=False)
    torch.testing.assert_close(twice["up"].energy_in, 2 * once["up"].energy_in)


def test_progress_bar_shows_the_loss(generator, capsys):
    fit_basis(Plain().double(), plain_batches(2, generator), PLAIN, n_steps=2)
    shown = capsys.readouterr().err
    assert "basis" in shown
    assert "2/2" in shown
    assert "loss=" in shown
    fit_basis(Plain().double(), plain_batches(2, generator), PLAIN, n_steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_half_precision_weights_give_a_float32_basis(generator):
    model = Plain().bfloat16()
    batches = [batch.bfloat16() for batch in plain_batches(2, generator)]
    basis = fit_basis(model, batches, PLAIN, 2, progress=False)["up"]
    assert basis.u.dtype == torch.float32
    torch.testing.assert_close(basis.u @ basis.u.T, torch.eye(8), rtol=0, atol=1e-5)


def test_bad_input(generator):
    model, batches = Plain().double(), plain_batches(2, generator)
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        fit_basis(model, batches, PLAIN, n_steps=0)
    with pytest.raises(ValueError, match="method must be one of"):
        fit_basis(model, batches, PLAIN, method="svd")
    with pytest.raises(ValueError, match=r"batches ended after 2 of n_steps=3 and cannot be start"):
        fit_basis(model, iter(batches), PLAIN, n_steps=3, progress=False)
    with pytest.raises(ValueError, match="batches ended after 0"):
        fit_basis(model, [], PLAIN, n_steps=3, progress=False)
    with pytest.raises(ValueError, match="has no scalar loss: put labels"):
        fit_basis(tiny("bert"), [{"input_ids": torch.ones(1, 3).long()}], n_steps=1)
    with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
        fit_basis(model, [batches[0], batches[0] * torch.nan], PLAIN, 2, progress=False)
    with pytest.raises(ValueError, match=r"no gradient reached \['down', 'up'\]"):
        fit_basis(
            model,
            batches,
            PLAIN,
            1,
            progress=False,
            loss_fn=lambda model, batch: torch.zeros((), requires_grad=True),
        )


# Basis itself.


def make(generator, in_=6, out=9):
    energy_in = torch.arange(in_, 0, -1).double() ** 3
    energy_out = torch.arange(out, 0, -1).double() ** 3
    return Basis(orthogonal(in_, generator), orthogonal(out, generator), energy_in, energy_out)


def test_truncate_by_energy(generator):
    basis = make(generator, 30, 53)
    found = {}
    for energy in (0.3, 0.9, 0.999, 1.0):
        cut = basis.truncate(energy=energy)
        for rank, spectrum in (
            (cut.rank_in, basis.energy_in),
            (cut.rank_out, basis.energy_out),
        ):
            assert rank % RANK_MULTIPLE == 0 or rank == len(spectrum)
            assert spectrum[:rank].sum() >= energy * spectrum.sum() * (1 - 1e-12)
            lower = (rank - 1) // RANK_MULTIPLE * RANK_MULTIPLE  # would not do
            assert spectrum[:lower].sum() < energy * spectrum.sum()
        assert torch.equal(cut.u, basis.u[: cut.rank_in])
        assert torch.equal(cut.v, basis.v[: cut.rank_out])
        assert torch.equal(cut.energy_in, basis.energy_in)
        found[energy] = (cut.rank_in, cut.rank_out)
    # Of 3 and 5, 14 and 24, 26 and 44, and all.
    assert found == {0.3: (8, 8), 0.9: (16, 24), 0.999: (30, 48), 1.0: (30, 53)}
    assert not basis.truncate(energy=1.0).is_truncated


def test_rounding_takes_no_more_than_there_is(generator):
    small = make(generator, 6, 9).truncate(energy=0.3)  # 1 and 1 vectors
    assert (small.rank_in, small.rank_out, small.is_truncated) == (6, 8, True)
    basis = make(generator, 30, 53)
    cut = basis.truncate(rank_in=5, rank_out=13).truncate(energy=0.3)  # 3 and 5
    assert (cut.rank_in, cut.rank_out) == (5, 8)


def test_truncate_to_ranks(generator):
    basis = make(generator)
    cut = basis.truncate(rank_in=2)
    assert (cut.rank_in, cut.rank_out, cut.is_truncated) == (2, 9, True)
    for bad in ({}, {"energy": 0.5, "rank_in": 2}):
        with pytest.raises(ValueError, match="truncate needs energy, or rank_in and rank_out"):
            basis.truncate(**bad)
    with pytest.raises(ValueError, match=r"rank_in must lie in \[1, 6\], got 7"):
        basis.truncate(rank_in=7)
    with pytest.raises(ValueError, match=r"energy must lie in \(0, 1\], got 2"):
        basis.truncate(energy=2)
    with pytest.raises(ValueError, match="energy needs the spectrum"):
        Basis(basis.u, basis.v).truncate(energy=0.5)
    with pytest.raises(ValueError, match=r"energy 0.99 needs \d vectors, this basis has 2"):
        cut.truncate(energy=0.99)


def test_one_factor(generator, tmp_path):
    basis = make(generator, 20, 29)
    for mode, name, size in (("in", "u", 20), ("out", "v", 29)):
        other = {"in": "out", "out": "in"}[mode]
        one = basis.select(mode == "in", mode == "out")
        assert getattr(one, name).data_ptr() == getattr(basis, name).data_ptr()
        assert getattr(one, f"rank_{mode}") == getattr(one, f"{mode}_features") == size
        assert getattr(one, f"rank_{other}") is getattr(one, f"{other}_features") is None
        assert set(one.tensors()) == {name, f"energy_{mode}"}
        assert repr(one) == f"Basis({mode}={size}, rank_{mode}={size})"
        assert not one.is_truncated
        cut = one.truncate(energy=0.9)
        assert cut.is_truncated
        rank = getattr(basis.truncate(energy=0.9), f"rank_{mode}")
        assert getattr(cut, f"rank_{mode}") == rank
        assert one.matches(basis.u)
        assert one.matching(torch.empty(0)).tensors()[name].dtype == torch.float32
        one.save(tmp_path / "one.safetensors")
        loaded = Basis.load(tmp_path / "one.safetensors").tensors()
        assert loaded.keys() == one.tensors().keys()
        missing = "v" if name == "u" else "u"
        with pytest.raises(ValueError, match=f"rank_{other} needs {missing}, which this basis has"):
            one.truncate(**{f"rank_{other}": 2})
        with pytest.raises(ValueError, match=f"the basis has no {missing}"):
            one.select(True, True)
    with pytest.raises(ValueError, match="mode_in or mode_out must be asked for"):
        basis.select(False, False)
    with pytest.raises(ValueError, match="a basis needs u or v"):
        Basis()
    with pytest.raises(ValueError, match="the energy of v is given, but no v"):
        Basis(basis.u, energy_out=basis.energy_out)
    (tmp_path / "none.safetensors").write_bytes(save({"w": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"holds no basis: its tensors are \{'w'\}"):
        Basis.load(tmp_path / "none.safetensors")


def test_save_and_load(generator, tmp_path):
    basis = make(generator).truncate(rank_in=3)
    basis.save(tmp_path / "folder" / "basis.safetensors")
    loaded = Basis.load(tmp_path / "folder" / "basis.safetensors")
    for name, tensor in basis.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["basis.safetensors"]
    with pytest.raises(FileNotFoundError, match="no basis file at"):
        Basis.load(tmp_path / "nothing")


def test_matching_leaves_the_original(generator):
    basis = make(generator)
    half = basis.matching(torch.empty(0, dtype=torch.bfloat16))
    assert half.u.dtype == torch.bfloat16
    assert half.energy_in.dtype == basis.u.dtype == torch.float64
    assert basis.matches(basis.u)
    assert not half.matches(basis.u)


def test_cast_in_a_cuda_graph_lives_on(monkeypatch, generator):
    basis = Basis(orthogonal(6, generator), None)
    cast = weakref.ref(basis.factor("u", torch.bfloat16))
    with monkeypatch.context() as graph:
        graph.setattr("sparsegrad_kernels.basis.is_captured", lambda tensor: True)
        for _ in range(2):
            basis.factor("u", torch.bfloat16)
    basis.factor("u", torch.float16)
    basis.to("cpu")
    assert cast() is not None and len(basis._captured) == 1
    assert not copy.deepcopy(basis)._captured


def test_cast_of_an_inference_tensor(generator):
    with torch.inference_mode():
        basis = Basis(orthogonal(6, generator).clone(), None)
    assert torch.equal(basis.factor("u", torch.bfloat16), basis.u.bfloat16())


def test_casts_are_kept_and_never_stale(generator):
    basis = Basis(orthogonal(6, generator), orthogonal(9, generator))
    assert basis.factor("u", basis.u.dtype) is basis.u
    assert basis.select(True, False).factor("v", torch.bfloat16) is None
    kept = basis.factor("u", torch.bfloat16)
    assert kept.dtype == torch.bfloat16 and basis.factor("u", torch.bfloat16) is kept
    assert torch.equal(kept, basis.u.bfloat16())
    assert basis.factor("v", torch.bfloat16).shape == (9, 9)
    assert basis.factor("u", torch.float16).dtype == torch.float16
    basis.u.neg_()
    assert torch.equal(basis.factor("u", torch.bfloat16), -kept)
    basis.u = orthogonal(6, generator)
    assert torch.equal(basis.factor("u", torch.bfloat16), basis.u.bfloat16())
    basis.to(torch.float64)
    with torch.inference_mode():
        basis.factor("u", torch.bfloat16)
    assert not basis.factor("u", torch.bfloat16).is_inference()
    with FakeTensorMode(allow_non_fake_inputs=True):
        basis.factor("v", torch.bfloat16)
    assert type(basis.factor("v", torch.bfloat16)) is torch.Tensor
    for other in (copy.deepcopy(basis), basis.float()):
        assert not other._casts
        assert torch.equal(other.factor("u", torch.bfloat16), basis.u.bfloat16())


def test_bad_factors(generator):
    u, v = orthogonal(4, generator), orthogonal(5, generator)
    with pytest.raises(ValueError, match="the rows of u are not orthonormal"):
        Basis(u * 1.01, v)
    with pytest.raises(ValueError, match="the rows of v are not orthonormal"):
        Basis(u, torch.randn(5, 5, generator=generator, dtype=torch.float64))
    with pytest.raises(ValueError, match="the rows of v are not orthonormal"):
        Basis(u, v * torch.nan)
    with pytest.raises(ValueError, match=r"u must have 1 to 3 rows for 3 columns"):
        Basis(u[:, :3], v)
    with pytest.raises(ValueError, match="v must have dtype and device of u"):
        Basis(u, v.float())
    with pytest.raises(ValueError, match=r"the energy of u must have shape \(4,\), got \(3,\)"):
        Basis(u, v, torch.ones(3))
    with pytest.raises(ValueError, match="u must be a floating matrix"):
        Basis(torch.ones(4), torch.ones(4))
