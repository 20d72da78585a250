"""`python -m sparsegrad_kernels.finetune`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The profiler measures memory, and would chatter.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from .. import SparseGradConfig, __version__
from ..config import MODES
from ..diagnostics import Recorder
from .data import Batches, DataError, TextData, encode, load_data
from .methods import LEARNING_RATES, METHODS, prepare
from .pretrained import Pretrained, find_pretrained
from .report import Result, output_folder, plot_losses, table, write_diagnosis, write_metrics
from .train import TrainingError, batch_loss, evaluate, train


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsegrad_kernels.finetune",
        description="Fine-tune the MLP layers of a pretrained model by SparseGrad, or by a peer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=[*METHODS, "all"], default="sparsegrad")
    add(
        "--data",
        default="tweets",
        help="tweets, bbc, or a CSV file with the columns text and label",
    )
    add("--task", choices=["classification", "regression"], default="classification")
    add("--model", metavar="PATH", help="a folder of transformers; by default packaged MiniLM")
    add("--density", type=float, default=0.01, help="share of the gradient's entries to keep")
    add("--energy", type=float, help="truncate the basis to this share of the gradient's energy")
    add("--modes", choices=MODES, default="both", help="of the gradient, which get a basis")
    add("--weight-space", choices=["original", "transformed"], default="original")
    add(
        "--delta-dtype",
        choices=["float32", "bfloat16"],
        help="of the gradient and moments of SparseGrad layers; by default the weights', float32",
    )
    add("--per-layer-basis", action="store_true", help="one basis for each layer, not each role")
    add("--basis-steps", type=int, default=30, help="batches of the preliminary phase")
    add("--layers", help='which blocks, as a slice: "::3" is every third')
    add("--epochs", type=float, default=1.0)
    add("--max-steps", type=int, default=250, help="stop there if the epochs are longer; 0: never")
    add("--batch-size", type=int, default=32)
    add("--max-length", type=int, default=128, help="tokens at which a text is cut off")
    add("--group-by-length", action="store_true", help="batches of texts of similar length")
    add("--lr", type=float, help=f"learning rate; by method: {LEARNING_RATES}")
    add(
        "--beta1",
        type=float,
        default=0.9,
        help="decay of the first moment; at 0 SparseGrad layers keep none, which saves its memory",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the data's order, the head, dropout (the split is fixed)",
    )
    add("--device", help="cpu, cuda, cuda:1, ...; by default cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add(
        "--diagnose",
        action="store_true",
        help="look at the gradients on the way (sparsegrad, meprop): figures and diagnosis.json",
    )
    add("--out", metavar="DIR", help="a new folder; by default sparsegrad-out/<date and time>")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("basis_steps", "batch_size", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.max_steps < 0:
        parser.error("--max-steps must not be negative")
    if not args.epochs > 0:
        parser.error("--epochs must be positive")
    if args.lr is not None and not args.lr > 0:
        parser.error("--lr must be positive")
    if not 0 <= args.beta1 < 1:
        parser.error("--beta1 must lie in [0, 1)")


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


class Job:
    """One call's settings and data, for each method alike."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = choose_device(args.device)
        self.dtype = getattr(torch, args.dtype)
        self.config = SparseGradConfig(
            density=args.density,
            energy=args.energy,
            modes=args.modes,
            layers=args.layers,
            shared_basis=not args.per_layer_basis,
            weight_space=args.weight_space,
            delta_dtype=args.delta_dtype and getattr(torch, args.delta_dtype),
        )
        self.pretrained: Pretrained = find_pretrained(args.model)
        self.data: TextData = load_data(args.data, args.task)
        self.tokenizer = self.pretrained.tokenizer()
        self.train_ids = encode(self.tokenizer, self.data.train_texts, args.max_length)
        self.eval_ids = encode(self.tokenizer, self.data.eval_texts, args.max_length)
        steps = max(1, round(args.epochs * len(self.train_batches(args.seed))))
        self.n_steps = min(steps, args.max_steps) if args.max_steps else steps

    def train_batches(self, seed: int) -> Batches:
        return Batches(
            self.train_ids,
            self.data.train_targets,
            self.args.batch_size,
            self.tokenizer.pad_token_id,
            shuffle=True,
            seed=seed,
            group_by_length=self.args.group_by_length,
        )

    def eval_batches(self) -> Batches:
        return Batches(
            self.eval_ids,
            self.data.eval_targets,
            self.args.batch_size,
            self.tokenizer.pad_token_id,
            shuffle=False,
        )

    def describe(self) -> str:
        data = self.data
        dropped = ", ".join(f"{n:,} {why}" for why, n in data.dropped.items() if n)
        lines = [
            f"model: {self.pretrained.source}",
            f"data:  {data.name}: {len(data.train_texts):,} texts to train on, "
            f"{len(data.eval_texts):,} held out" + (f" (left out: {dropped})" if dropped else ""),
            f"       {data.source}",
        ]
        if not data.is_regression:
            lines.append(
                f"       classes: {', '.join(data.labels)}; "
                f"the most frequent one is {100 * data.majority:.1f} % of those held out"
            )
        return "\n".join(lines)

    def run(self, method: str, folder: Path) -> Result:
        """Train by `method`, evaluate, and write the merged model into `folder`."""
        args = self.args
        torch.manual_seed(args.seed)
        model: Any = self.pretrained.classifier(self.data).to(self.device)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        lr = LEARNING_RATES[method] if args.lr is None else args.lr
        prepared = prepare(
            method,
            model,
            # Other batches than those of the first steps, so that the basis is not fitted to them.
            self.train_batches(args.seed + 1),
            functools.partial(batch_loss, device=self.device, dtype=self.dtype),
            self.config,
            lr,
            args.basis_steps,
        )
        for group in prepared.optimizer.param_groups:
            group["betas"] = args.beta1, group["betas"][1]
        print(f"{method}: {prepared.about}, {self.n_steps} steps at lr {lr:g}", flush=True)
        diagnose = args.diagnose and method in ("sparsegrad", "meprop")
        recorder = Recorder(prepared.model, max(1, self.n_steps // 15)) if diagnose else None
        with recorder or contextlib.nullcontext():
            history = train(
                prepared.model,
                prepared.optimizer,
                self.train_batches(args.seed),
                self.n_steps,
                self.device,
                self.dtype,
                title=method,
            )
        merged: Any = prepared.merged()
        metric, score = evaluate(merged, self.eval_batches(), self.device, self.dtype)
        merged.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if recorder is not None:
            write_diagnosis(folder.with_name(f"diagnosis-{method}"), recorder.diagnosis())
        return Result(
            method=method,
            about=prepared.about,
            trained_numbers=prepared.trained_numbers,
            metric=metric,
            score=score,
            steps=self.n_steps,
            steps_per_second=history.steps_per_second,
            peak_bytes=history.peak_bytes,
            lr=lr,
            losses=history.losses,
        )


def run(args: argparse.Namespace) -> Path:
    """The whole job; the folder it wrote."""
    import transformers

    transformers.logging.set_verbosity_error()  # else it warns that the head is new
    transformers.logging.disable_progress_bar()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(args.out) if args.out else Path("sparsegrad-out") / stamp
    methods = METHODS if args.method == "all" else (args.method,)
    with output_folder(out) as folder:
        job = Job(args)
        print(job.describe(), flush=True)
        results = [
            job.run(method, folder / method if len(methods) > 1 else folder / "model")
            for method in methods
        ]
        about = {
            "arguments": vars(args),
            "n_train": len(job.data.train_texts),
            "n_eval": len(job.data.eval_texts),
            "majority": None if job.data.is_regression else job.data.majority,
            "versions": {
                "sparsegrad_kernels": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "device": str(job.device),
            "threads": torch.get_num_threads(),
        }
        write_metrics(folder / "metrics.json", results, about)
        plot_losses(folder / "loss.png", results)
    print(f"\n{table(results)}\n\nwritten to {out}: the merged model, metrics.json, loss.png")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: tidy up, then leave
    sys.exit(main())
