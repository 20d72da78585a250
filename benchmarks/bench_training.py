"""The paper's Tables 3, 7 and 8: steps a second and peak memory of each method, on any device.

    python benchmarks/bench_training.py --quick --json training.json
    python benchmarks/bench_training.py --device cuda --models roberta-base --json training.json

A step is split into forward, backward and the optimizer's, and ends with a synchronisation, as that
of a loop which shows its loss. Methods take turns, each with the model to itself: it is made anew
for every turn, so that memory holds one, and figures are medians over all turns' steps. Peak memory
is from a turn of its own: of CUDA's allocator, or on the CPU by the profiler, of tensors. Running
out of memory makes a row. All of a model and task is written as soon as it is there.

`--quick` takes MiniLM with two layers, two tasks and few steps: it shows that all runs, and is no
measurement of a whole model. Lengths and batch sizes are in `glue.py`, what is trained in
`training_methods.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
from dataclasses import asdict
from pathlib import Path

import glue
import models
import torch
from measure import provenance
from training_methods import METHODS
from training_runs import PARTS, Row, TrainingBench, run


def show(rows: list[Row]) -> None:
    first = rows[0]
    print(
        f"\n{first.model}, {first.task}: batch {first.batch}, {first.tokens} tokens, of which "
        f"{first.nonzero_tokens} are no padding"
    )
    print(f"{'method':36}{'steps/s':>9}{'peak MiB':>10}{'forward':>10}{'backward':>10}{'step':>9}")
    for row in rows:
        if row.steps_per_second is None:
            print(f"{row.method:36}{row.status:>9}")
            continue
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        parts = "".join(f"{1e3 * row.seconds.get(part, math.nan):>8.1f}ms" for part in PARTS)
        figures = f"{row.steps_per_second:>9.2f}{peak:>10}{parts}"
        print(f"{row.method:36}{figures}  {row.about}", flush=True)


def limit_memory() -> None:
    """On the CPU: asking for more than there is fails, instead of being killed for it later."""
    available = int(
        next(
            line.split()[1]
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
    )
    resource.setrlimit(resource.RLIMIT_DATA, (available * 1024, resource.RLIM_INFINITY))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--models", nargs="+", choices=models.MODELS)
    parser.add_argument("--tasks", nargs="+", choices=glue.TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, help="by default all; 2 with --quick")
    parser.add_argument("--batch-size", type=int, help="by default the paper's for each task")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--turns", type=int, help="of each method: 3, or 2 with --quick")
    parser.add_argument("--steps", type=int, help="timed in each turn: 8, or 3 with --quick")
    parser.add_argument("--basis-steps", type=int, help="30, or 2 with --quick")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--tf32", action="store_true", help="multiply float32 as tf32")
    parser.add_argument("--graph", action="store_true", help="time a CUDA graph of the step")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.models = options.models or (["minilm"] if quick else list(models.MODELS))
    options.tasks = options.tasks or (["cola", "mnli"] if quick else list(glue.TASKS))
    options.layers = options.layers or (2 if quick else None)
    if options.graph:  # torch.optim.SparseAdam reads from the device
        options.methods = [name for name in options.methods if not name.startswith("paper")]
    options.batch_size = options.batch_size or (8 if quick else None)
    options.turns = options.turns or (2 if quick else 3)
    options.steps = options.steps or (3 if quick else 8)
    options.basis_steps = options.basis_steps or (2 if quick else 30)
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if options.tf32 else "ieee"
    if device.type == "cpu":
        limit_memory()
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    rows: list[Row] = []
    for name in options.models:
        # LLaMA's tokens are all there: no task's padding.
        for task in ["packed"] if name == "llama-7b-block" else options.tasks:
            found = run(TrainingBench(name, task, options), options.methods, options.turns)
            show(found)
            rows += found
            if options.json:
                document = {
                    "kind": "training",
                    "provenance": provenance(device),
                    "settings": settings,
                    "rows": [asdict(row) for row in rows],
                }
                options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
