"""How one linear's training step scales, and where SparseGrad crosses dense training and LoRA.

    python benchmarks/scaling.py --quick --json scaling.json
    python benchmarks/scaling.py --device cuda --json scaling.json

One axis at a time away from 768 -> 3072, 2048 tokens, half of them with a gradient, density 1%.
Contenders take turns; figures are medians; gradients are checked before anything is timed.
`communication.py` adds what data-parallel training would send.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import communication
import torch
from measure import Run, medians, provenance
from steps import Steps, random_basis

AXES: dict[str, list[float]] = {
    "tokens": [128, 256, 512, 1024, 2048, 4096, 8192],
    "hidden size": [128, 256, 512, 768, 1024, 2048],
    "density": [0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.1],
    "nonzero fraction": [0.05, 0.1, 0.25, 0.5, 0.75, 1.0],
}
CENTRE = {"tokens": 2048, "hidden size": 768, "density": 0.01, "nonzero fraction": 0.5}
_ON_GPU = {"tokens": [16384, 32768], "hidden size": [4096]}
_QUICK = {"tokens": 1024, "hidden size": 512}  # no further than this
PEERS = ("dense", "LoRA r=7")


def contenders(at: dict[str, float], device: torch.device) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(0)
    hidden = int(at["hidden size"])
    shape = (hidden, 4 * hidden)
    steps = Steps(
        int(at["tokens"]), at["nonzero fraction"], generator, *shape, at["density"], device
    )
    full = random_basis(*shape, generator, device)
    # The shares that design section 2.3 took for its example, 919x196.
    short = full.truncate(rank_in=max(1, shape[0] * 196 // 768), rank_out=shape[1] * 919 // 3072)
    return {
        "dense": steps.dense(),
        "LoRA r=7": steps.lora(),
        "MeProp": steps.sparsegrad(None),
        "SparseGrad": steps.sparsegrad(full),
        "SparseGrad, basis of the input": steps.sparsegrad(full.select(True, False)),
        "SparseGrad, basis 30% x 26%": steps.sparsegrad(short),
        "bound": steps.bound(),
    }


def crossings(points: list[dict], ours: str, peer: str) -> list[float]:
    """Where the two cost the same: linear in the logarithms between measured points."""
    found = []
    for before, after in itertools.pairwise(points):
        low, high = (
            math.log(point["seconds"][ours] / point["seconds"][peer]) for point in (before, after)
        )
        if low * high < 0:
            share = low / (low - high)
            x0, x1 = math.log(before["value"]), math.log(after["value"])
            found.append(math.exp(x0 + share * (x1 - x0)))
    return found


def curve(
    axis: str, values: list[float], centre: dict[str, float], repeats: int, device: torch.device
) -> dict:
    points = []
    for value in values:
        seconds = medians(contenders({**centre, axis: value}, device), repeats, device)
        points.append({"value": value, "seconds": seconds})
        print(
            f"{axis} {value:g}: "
            + ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items()),
            flush=True,
        )
    ours = [name for name in points[0]["seconds"] if name.startswith("SparseGrad")]
    return {
        "axis": axis,
        "fixed": {key: value for key, value in centre.items() if key != axis},
        "points": points,
        "crossings": {
            f"{name} and {peer}": crossings(points, name, peer) for name in ours for peer in PEERS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--repeats", type=int, help="11, or 3 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    repeats = options.repeats or (3 if options.quick else 11)
    centre = {**CENTRE, **_QUICK} if options.quick else CENTRE
    curves = []
    for axis, values in AXES.items():
        if options.quick:
            values = [value for value in values if value <= _QUICK.get(axis, math.inf)]
        elif device.type == "cuda":
            values = values + _ON_GPU.get(axis, [])
        curves.append(curve(axis, values, centre, repeats, device))
        print(f"the same cost at: {curves[-1]['crossings']}")
        if options.json:
            document = {
                "kind": "scaling",
                "provenance": provenance(device),
                "curves": curves,
                "communication": communication.table(),
            }
            options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
