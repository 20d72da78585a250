from __future__ import annotations

import pytest
from models import Plain, tiny
from torch import nn

from sparsegrad_kernels import SparseGradConfig
from sparsegrad_kernels.config import find_targets, wanted_modes

ROLES = {
    "bert": {"intermediate.dense", "output.dense"},
    "roberta": {"intermediate.dense", "output.dense"},
    "deberta": {"intermediate.dense", "output.dense"},
    "deberta-v2": {"intermediate.dense", "output.dense"},
    "distilbert": {"ffn.lin1", "ffn.lin2"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "llama": {"mlp.up_proj", "mlp.down_proj"},
    "mistral": {"mlp.up_proj", "mlp.down_proj"},
    "qwen2": {"mlp.up_proj", "mlp.down_proj"},
}


@pytest.mark.parametrize("model_type", ROLES)
def test_known_models(model_type):
    targets = find_targets(tiny(model_type), SparseGradConfig())
    assert {target.group for target in targets.values()} == ROLES[model_type]
    assert len(targets) == 4  # two blocks
    assert not any("attention" in name or "attn" in name for name in targets)
    for target in targets.values():
        assert sorted(target.module.weight.shape) == [16, 32]


def test_suffixes_regex_and_layers():
    model = tiny("llama", layers=7)
    names = list(find_targets(model, SparseGradConfig(target_modules=["gate_proj"], layers="::3")))
    assert names == [f"model.layers.{i}.mlp.gate_proj" for i in (0, 3, 6)]
    assert len(find_targets(model, SparseGradConfig(layers=[1, 2]))) == 4
    chosen = find_targets(model, SparseGradConfig(target_modules=r".*\.(q|k)_proj", layers="-1:"))
    assert [name.rsplit(".", 1)[1] for name in chosen] == ["q_proj", "k_proj"]


def test_suffix_ends_at_a_dot():
    model = nn.ModuleDict({"wide_up": nn.Linear(2, 2), "a": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    assert list(find_targets(model, SparseGradConfig(target_modules=["up"]))) == ["a.up"]


def test_groups():
    model = Plain(3)
    config = SparseGradConfig(target_modules=["up", "down"])
    assert {t.group for t in find_targets(model, config).values()} == {"up", "down"}
    per_layer = SparseGradConfig(target_modules=["up"], shared_basis=False)
    targets = find_targets(model, per_layer)
    assert [t.group for t in targets.values()] == list(targets)
    model.blocks[1]["up"] = nn.Linear(8, 13)
    groups = {t.group for t in find_targets(model, config).values()}
    assert groups == {"up 12x8", "up 13x8", "down"}


def test_nothing_matches():
    with pytest.raises(ValueError, match=r"'nope'.* matches no linear.*: down, head, up"):
        find_targets(Plain(), SparseGradConfig(target_modules=["nope"]))
    with pytest.raises(ValueError, match=r"target_modules is needed.* type None.*: down, head"):
        find_targets(Plain(), SparseGradConfig())
    with pytest.raises(ValueError, match=r"layers names blocks that the model lacks: \[9\]"):
        find_targets(tiny("bert"), SparseGradConfig(layers=[0, 9]))
    with pytest.raises(ValueError, match=r"layers '5:' leaves none of the blocks"):
        find_targets(tiny("bert"), SparseGradConfig(layers="5:"))


def test_quantised_subclasses_are_no_candidates():
    class Packed(nn.Linear):
        pass

    model = nn.ModuleDict({"up": Packed(2, 2)})
    with pytest.raises(ValueError, match="Linears of this model: none"):
        find_targets(model, SparseGradConfig(target_modules=["up"]))


def test_modes():
    assert wanted_modes("both", (3, 2)) == (True, True)
    assert wanted_modes("in", (3, 2)) == wanted_modes("smaller", (3, 2)) == (True, False)
    assert wanted_modes("out", (3, 2)) == wanted_modes("smaller", (2, 3)) == (False, True)
    assert wanted_modes("smaller", (2, 2)) == (True, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, r"density must lie in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
        ({"energy": 0.0}, r"energy must lie in \(0, 1\], got 0.0"),
        ({"energy": 0.5, "ranks": (1, 1)}, "energy and ranks both truncate"),
        ({"ranks": (0, 3)}, r"ranks must be \(r_out, r_in\)"),
        ({"weight_space": "both"}, "weight_space must be"),
        ({"modes": "left"}, "modes must be one of both, smaller, in, out, got 'left'"),
        ({"modes": "in", "ranks": (2, 2)}, "ranks truncates both modes, but modes is 'in'"),
        ({"target_modules": "("}, r"target_modules is no regular expression: '\('"),
        ({"layers": "a:b"}, "layers must look like"),
        ({"density": float("nan")}, "density must lie"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseGradConfig(**settings)
