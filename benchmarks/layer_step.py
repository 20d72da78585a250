"""One linear's training step on a GPU, as a CUDA graph and from Python, and the kernels it is.

    python benchmarks/layer_step.py --kernels --json layer.json

The linear is BERT-base's 768 -> 3072 or 3072 -> 768 at 4096 tokens. Replays of the methods' graphs
take turns and figures are medians; "host" is the time that Python, PyTorch and the driver need to
launch a step without a graph, and the step takes the longer of the two. Gradients are checked
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Run, captured, host_seconds, medians, provenance
from steps import Steps, random_basis

SHAPES = {"768 -> 3072": (768, 3072), "3072 -> 768": (3072, 768)}
SHARES = (0.48, 0.09)  # of the tokens: lengths like MNLI's in its own batch, and like CoLA's
RANKS = {768: 200, 3072: 920}  # of the truncated basis
TOKENS = 4096


def methods(shape: tuple[int, int], share: float, dtype: torch.dtype) -> dict[str, Callable]:
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    half = None if dtype == torch.float32 else dtype
    steps = Steps(TOKENS, share, generator, *shape, 0.01, device, half, capturable=True)
    full = random_basis(*shape, generator, device)
    smaller = full.select(shape[0] < shape[1], shape[1] < shape[0])
    # Design section 2.3's example, 919x196, in the multiples of 8 that `energy` would choose.
    short = full.truncate(rank_in=RANKS[shape[0]], rank_out=RANKS[shape[1]])
    return {
        "dense": steps.dense,
        "LoRA r=7": steps.lora,
        "MeProp": lambda: steps.sparsegrad(None),
        "SparseGrad, smaller modes": lambda: steps.sparsegrad(smaller),
        "SparseGrad, basis 30% x 26%": lambda: steps.sparsegrad(short),
        "SparseGrad": lambda: steps.sparsegrad(full),
    }


def kernels(replay: Run, repeats: int = 5) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds of each kernel in a step, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    rows = [(n, len(each) / repeats, sum(each) / repeats) for n, each in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--kernels", action="store_true", help="list them")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "tf32"])
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        torch_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        for name, shape in SHAPES.items():
            for share in SHARES:
                runs = {m: make() for m, make in methods(shape, share, torch_dtype).items()}
                host = {m: host_seconds(run) for m, run in runs.items()}
                replays = {m: captured(run) for m, run in runs.items()}
                times = medians(replays, options.repeats, torch.device("cuda"))
                print(f"\n{name}, {dtype}, {share:.0%} of {TOKENS} tokens: us of a step, host's")
                for method, seconds in times.items():
                    print(f"{method:30}{1e6 * seconds:>9.1f}{1e6 * host[method]:>9.1f}")
                    row = {"shape": name, "dtype": dtype, "share": share, "method": method}
                    row |= {"graph": seconds, "host": host[method]}
                    if options.kernels:
                        row["kernels"] = kernels(replays[method])
                        for kernel, launches, micros in row["kernels"]:
                            print(f"    {micros:8.1f} {launches:5.1f}  {kernel[:110]}")
                    rows.append(row)
                torch.cuda.synchronize()
    if options.json:
        document = {"kind": "layer step", "provenance": provenance(torch.device("cuda"))}
        options.json.write_text(json.dumps(document | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
