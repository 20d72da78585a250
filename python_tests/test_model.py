from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import Plain, tiny, token_batches
from torch import nn

from sparsegrad_kernels import (
    SparseAdam,
    SparseGradConfig,
    SparseGradLinear,
    convert,
    fit_basis,
    load,
    merge,
    save,
)

ARCHITECTURES = ["bert", "gpt2", "llama", "distilbert"]


def fitted(model_type, generator, **settings):
    model = tiny(model_type).double()
    if model_type == "plain":
        settings.setdefault("target_modules", ["up", "down"])
        batches = [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    else:
        batches = token_batches(4, generator)
    config = SparseGradConfig(density=0.05, **settings)
    return model, batches, config, fit_basis(model, batches, config, 4, progress=False)


def logits(model, batch):
    return model.eval()(**batch).logits.detach()


def train(model, batches):
    model.train()
    optimizer = SparseAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("space", ["original", "transformed"])
@pytest.mark.parametrize("energy", [None, 0.8])
@pytest.mark.parametrize("modes", ["both", "smaller"])
def test_convert_train_merge(model_type, space, energy, modes, generator, tmp_path):
    settings = {"weight_space": space, "energy": energy, "modes": modes}
    model, batches, config, basis = fitted(model_type, generator, **settings)
    before = logits(model, batches[0])
    original = {name: type(module) for name, module in model.named_modules()}
    assert convert(model, basis, config) is model
    layers = [m for m in model.modules() if isinstance(m, SparseGradLinear)]
    assert len(layers) == 4
    for layer in layers:
        rank_out, rank_in = (layer.weight if layer.delta is None else layer.delta).shape
        assert layer.k == min(round(0.05 * 16 * 32), rank_out * rank_in)
        assert layer.basis.is_truncated == (energy is not None)
        sizes = sorted([(layer.in_features, "u", rank_in), (layer.out_features, "v", rank_out)])
        (smaller, factor, rank), (larger, other, other_rank) = sizes
        assert (smaller, larger) == (16, 32)
        assert layer.basis.tensors()[factor].shape == (rank, 16)
        assert rank == (16 if energy is None else 8)
        if modes == "smaller":
            assert other not in layer.basis.tensors()
            assert other_rank == 32
    torch.testing.assert_close(logits(model, batches[0]), before)
    train(model, batches)
    trained = logits(model, batches[0])
    assert (trained - before).abs().max() > 1e-3
    # Merged: the original modules, the trained function, a plain state_dict.
    if space == "original":
        plain = copy.deepcopy(model).state_dict()
    merged = merge(model)
    assert {name: type(module) for name, module in merged.named_modules()} == original
    torch.testing.assert_close(logits(merged, batches[0]), trained)
    if space == "original":
        assert set(plain) == set(merged.state_dict())
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(plain[name], tensor)
    assert not any("delta" in name or "basis" in name for name in merged.state_dict())
    # And it is loaded by from_pretrained.
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, batches[0]), trained)


def test_one_basis_per_group_is_shared(generator):
    model, _, config, basis = fitted("bert", generator)
    convert(model, basis, config)
    groups: dict[str, set[int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseGradLinear):
            groups.setdefault(name.split(".", 4)[4], set()).add(id(layer.basis))
    assert set(groups) == set(basis)
    assert all(len(ids) == 1 for ids in groups.values())


def test_of_a_basis_of_both_modes_one_can_be_taken(generator):
    model, _, _, basis = fitted("bert", generator)
    convert(model, basis, SparseGradConfig(modes="smaller"))
    for layer in model.modules():
        if isinstance(layer, SparseGradLinear):
            assert (layer.u is None) == (layer.in_features == 32)
            assert (layer.v is None) == (layer.out_features == 32)
    assert all(b.u is not None and b.v is not None for b in basis.values())


def test_basis_can_be_used_again(generator):
    model, _, config, basis = fitted("bert", generator)
    kept = {name: b.u.clone() for name, b in basis.items()}
    convert(model, basis, config).bfloat16()
    assert all(torch.equal(basis[name].u, u) for name, u in kept.items())
    convert(tiny("bert").double(), basis, config)


@pytest.mark.parametrize("settings", [{"ranks": (10, 6)}, {"shared_basis": False}, {"layers": [1]}])
def test_settings_reach_the_layers(settings, generator):
    model, batches, config, basis = fitted("bert", generator, **settings)
    convert(model, basis, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseGradLinear)}
    if "ranks" in settings:
        assert {tuple(layer.delta.shape) for layer in layers.values()} == {(10, 6)}
    elif "layers" in settings:
        assert all(".1." in name for name in layers)
        assert len(layers) == 2
    else:
        assert len({id(layer.basis) for layer in layers.values()}) == 4
    train(model, batches)


def test_meprop(generator):
    model, batches, config, _ = fitted("bert", generator)
    convert(model, None, config)
    assert all(m.basis is None for m in model.modules() if isinstance(m, SparseGradLinear))
    before = logits(model, batches[0])
    train(model, batches)
    assert not torch.allclose(logits(model, batches[0]), before)


def test_convert_on_a_batch_norm_model(generator):
    model, batches, config, basis = fitted("plain", generator)
    before = model.eval()(batches[0]).detach()
    torch.testing.assert_close(convert(model, basis, config)(batches[0]).detach(), before)


def test_convert_errors_leave_the_model(generator):
    model, _, config, basis = fitted("bert", generator)
    names = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"basis has no entry for 'intermediate.dense'.*output"):
        convert(model, {"output.dense": basis["output.dense"]}, config)
    swapped = {
        "intermediate.dense": basis["output.dense"],
        "output.dense": basis["intermediate.dense"],
    }
    with pytest.raises(ValueError, match=r"is for out_features=16, but .* is \[32, 16\]"):
        convert(model, swapped, config)
    one = {name: b.select(b.in_features == 16, b.out_features == 16) for name, b in basis.items()}
    with pytest.raises(
        ValueError, match=r"'intermediate.dense', needed by .* has no v: was it fit"
    ):
        convert(model, one, config)
    with pytest.raises(ValueError, match="matches no linear"):
        convert(model, basis, SparseGradConfig(target_modules=["nope"]))
    with pytest.raises(ValueError, match="has no SparseGradLinear to merge"):
        merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == names
    convert(model, basis, config)
    with pytest.raises(ValueError, match="merge it first"):
        convert(model, basis, config)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": (9, 7)},
        {"ranks": (9, 7), "weight_space": "transformed"},
        {"modes": "smaller", "energy": 0.8, "delta_dtype": torch.bfloat16},
        {"modes": "smaller", "energy": 0.8, "weight_space": "transformed"},
    ],
)
def test_save_and_load(model_type, settings, generator, tmp_path):
    model, batches, config, basis = fitted(model_type, generator, **settings)
    base = copy.deepcopy(model)
    for name, p in model.named_parameters():
        p.requires_grad_("classifier" in name or "score" in name)
    convert(model, basis, config)
    optimizer = train(model, batches)
    path = tmp_path / "deep" / "model.safetensors"
    save(model, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    loaded = load(base, path)
    assert loaded is base
    torch.testing.assert_close(logits(loaded, batches[0]), logits(model, batches[0]))
    # Training goes on the same from there.
    for name, p in loaded.named_parameters():
        p.requires_grad_(dict(model.named_parameters())[name].requires_grad)
    trained = [p for p in loaded.parameters() if p.requires_grad]
    resumed = SparseAdam(trained, lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (loaded, resumed)):
        m.eval()(**batches[1]).loss.backward()  # no dropout
        o.step()
    torch.testing.assert_close(logits(loaded, batches[0]), logits(model, batches[0]))
    layers = [m for m in loaded.modules() if isinstance(m, SparseGradLinear)]
    assert len({id(layer.basis) for layer in layers}) == 2
    assert {layer.delta_dtype for layer in layers} == {config.delta_dtype}


def test_load_errors_leave_the_model(generator, tmp_path):
    model, _, config, basis = fitted("bert", generator)
    convert(model, basis, config)
    save(model, tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="no saved model at"):
        load(tiny("bert"), tmp_path / "nothing")
    basis["output.dense"].save(tmp_path / "basis")
    with pytest.raises(ValueError, match="was not written by sparsegrad_kernels.save"):
        load(tiny("bert"), tmp_path / "basis")
    other = tiny("llama").double()
    with pytest.raises(ValueError, match="the model has no plain linear at bert"):
        load(other, tmp_path / "saved")
    assert not any(isinstance(m, SparseGradLinear) for m in other.modules())
    with pytest.raises(ValueError, match="no plain linear at .*, but SparseGradLinear"):
        load(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="save it as any other model"):
        save(Plain(), tmp_path / "plain")
    shallow = tiny("bert", layers=1).double()
    with pytest.raises(ValueError, match=r"no plain linear at .*layer.1"):
        load(shallow, tmp_path / "saved")
    wide = tiny("bert").double()
    wide.bert.encoder.layer[0].intermediate.dense = nn.Linear(16, 33).double()
    with pytest.raises(ValueError, match=r"basis is for another shape|in the file"):
        load(wide, tmp_path / "saved")


def test_interrupted_save_leaves_the_old_file(generator, tmp_path, monkeypatch):
    model, _, config, basis = fitted("bert", generator)
    convert(model, basis, config)
    path = tmp_path / "saved"
    save(model, path)
    old = path.read_bytes()

    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsegrad_kernels._files.save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_trainer(generator, tmp_path):
    """transformers' Trainer: clipping, accumulation, checkpoints that from_pretrained loads."""
    model = tiny("bert")
    batches = token_batches(8, generator)
    config = SparseGradConfig(density=0.05)
    convert(model, fit_basis(model, batches, config, 4, progress=False), config)
    rows = [{key: value[i] for key, value in b.items()} for b in batches for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
    )
    before = copy.deepcopy(model).state_dict()
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        optimizers=(SparseAdam(model.parameters(), lr=1e-2), None),
    )
    assert trainer.train().global_step == 4
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-4"
    )
    torch.testing.assert_close(logits(loaded, batches[0]), logits(model, batches[0]))
    trainer.args.max_steps = 6
    assert trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 6
