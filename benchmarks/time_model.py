"""A prediction, made without a GPU, of how long each operator and a layer's step take on an H100.

python benchmarks/time_model.py [--out DIR]

A kernel's time is

    max(bytes / bandwidth, flops / rate) + gap + waits

- bytes: each operand once, as the operator's algorithm reads and writes it; sparse accesses count
  whole sectors of 32 bytes. "Cold" operands lie in HBM. "Warm" ones were just written or read: they
  come from L2 if the kernel's whole set fits in it.
- bandwidth: that of HBM or L2, times `HBM_SHARE`, times the share of it that the kernel's resident
  warps can ask for (Little's law; occupancy from `results/triton_resources.json`).
- flops / rate: multiply-adds count 2; the tensor cores' peak times the share of it that a good
  product of large matrices reaches, times how full the waves of output tiles are. Of
  several tiles and splits along K the best is taken, as autotuning would.
- gap: between kernels of one stream in a CUDA graph. Without a graph, the host needs `HOST_LAUNCH`
  for each launch, and a step takes the longer of the two sums.
- waits: where tasks of one launch need the results of others that have just been made.

Every constant below is either a data sheet's or marked as an assumption; the first measurement
should replace the assumptions, not the formulas. What the model leaves out: clock changes under
power, contention for L2, imbalance of gathered rows, and the allocator.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# NVIDIA H100 SXM5 80 GB, data sheet (dense rates, without structured sparsity).
HBM = 3.35e12  # bytes / s
RATE = {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}  # flop / s; fp32 is not on tensor cores
L2_SIZE = 50e6  # bytes
MULTIPROCESSORS = 132
WARPS = 64  # of a multiprocessor
SECTOR = 32  # bytes, the least that is read or written

# Assumptions.
L2 = 5.5e12  # bytes / s; published microbenchmarks of reads lie between 5.5 and 7
L2_USABLE = 0.6  # of its size: it is two halves, and what is read from afar is held in both
HBM_SHARE = 0.92  # of the data sheet, as large copies reach
LATENCY = 700e-9  # s, from HBM under load
IN_FLIGHT = 32  # bytes that one thread asks for at once: two loads of 16
LIBRARY = 0.72  # of a tensor core's peak, cuBLAS on large matrices at sustained clocks
TRITON = 0.85 * LIBRARY  # the aim set for these kernels
GAP = 1.5e-6  # s between kernels of a CUDA graph
WAIT = 3e-6  # s from the last task's signal, or its start, until the tasks behind it have begun
HOST_LAUNCH = 1e-5  # s of Python, PyTorch, Triton and driver for each launch
HOST_READ = 12e-6  # s from the end of a kernel until the host has its result and launches again
TILES = {(128, 256): 1.0, (128, 128): 0.95, (64, 128): 0.8, (64, 64): 0.6}  # share of the rate
SPLIT = 512  # the least of K that a split is left with

RANK = 8  # of LoRA
TRUNCATED = 0.55  # of each side's basis: 30% of the matrix, which `energy=0.95` kept on MiniLM
# Kernels and fills that each operator's launcher starts (products: counted where they are made).
LAUNCHES = {"compact_indices": 3, "topk_coo": 7, "sparse_adam_": 1, "fold_": 2}


@dataclass(frozen=True)
class Case:
    """One linear layer `inputs -> outputs`, one step."""

    name: str
    inputs: int
    outputs: int
    tokens: int
    nonzero: float  # share of tokens with a gradient
    density: float  # of the gradient that is kept
    size: int = 2  # bytes of an element
    rate: str = "bf16"
    kept: float = 1.0  # of each side's basis
    smaller: bool = False  # a basis for the smaller side alone, the identity for the other

    @property
    def weight(self) -> int:
        return self.inputs * self.outputs

    @property
    def rank_in(self) -> int:
        return round(self.kept * self.inputs)

    @property
    def rank_out(self) -> int:
        return round(self.kept * self.outputs)

    @property
    def rotated(self) -> int:
        return self.rank_in * self.rank_out

    @property
    def k(self) -> int:
        return round(self.density * self.weight)

    @property
    def rows(self) -> int:
        return round(self.nonzero * self.tokens)


@dataclass(frozen=True)
class Work:
    """What one kernel does, or several in a row."""

    cold: float = 0  # bytes
    warm: float = 0  # bytes of what was just used
    flops: float = 0
    rate: float = 1
    launches: float = 1
    occupancy: float = 1
    host_reads: int = 0
    waits: int = 0
    resident: float = 0  # bytes that the warm ones are spread over, where they are read repeatedly

    def seconds(self, state: str = "mixed") -> float:
        """On the device; `state` "cold" or "warm" says of all bytes where they are."""
        resident = self.cold + (self.resident or self.warm)
        fits = resident <= L2_USABLE * L2_SIZE
        near = self.warm if state == "mixed" else (self.cold + self.warm) * (state == "warm")
        near = near if fits else 0
        far = self.cold + self.warm - near
        asked = self.occupancy * WARPS * 32 * IN_FLIGHT * MULTIPROCESSORS / LATENCY
        memory = far / min(HBM * HBM_SHARE, asked) + near / (L2 * HBM_SHARE)
        waiting = self.launches * GAP + self.host_reads * HOST_READ + self.waits * WAIT
        return max(memory, self.flops / self.rate) + waiting


def occupancies(path: Path) -> dict[str, float]:
    """Of each operator's least resident kernel, each in its most resident configuration."""
    best: dict[tuple[str, str], float] = {}
    for record in json.loads(path.read_text())["kernels"] if path.exists() else ():
        if record["target"] == "cuda:90" and not record["problems"]:
            key = (record["op"], record["kernel"])
            best[key] = max(best.get(key, 0), record["occupancy"])
    worst: dict[str, float] = {}
    for (op, _), occupancy in best.items():
        worst[op] = min(worst.get(op, 1), occupancy)
    return worst


def matmul(case: Case, m: int, n: int, depth: int, share: float, warm: str = "") -> Work:
    """`[m, depth] @ [depth, n]` by the best tile and split; `warm` ones of "abc" were just used."""
    bytes_of = {"a": case.size * m * depth, "b": case.size * depth * n, "c": case.size * m * n}
    near = sum(bytes_of[name] for name in warm)
    far = sum(bytes_of.values()) - near
    choices = []
    for (rows, cols), share_of_tile in TILES.items():
        tiles = max(1, ceil(m / rows) * ceil(n / cols))
        for splits in range(1, 1 + max(1, min(ceil(depth / SPLIT), MULTIPROCESSORS // tiles))):
            waves = tiles * splits / MULTIPROCESSORS
            # The padding of the last tiles is computed too.
            padded = tiles * rows * cols / (m * n) if m * n else 1
            rate = RATE[case.rate] * share * share_of_tile * waves / ceil(waves) / padded
            parts = 8 * m * n * splits if splits > 1 else 0  # float32, added up by a second kernel
            work = Work(far, near + parts, 2 * m * n * depth, rate, launches=1 + (splits > 1))
            choices.append(work)
    return min(choices, key=Work.seconds)


def sectors(case: Case) -> float:
    """Bytes touched in a rotated matrix by k entries spread evenly over it."""
    per_sector = SECTOR // case.size
    return case.rotated * case.size * (1 - (1 - case.k / case.rotated) ** per_sector)


def detection(case: Case, occupancy: float) -> Work:
    """One read of the gradient; flags of rows and columns; then the indices from the flags."""
    flags = case.tokens + case.outputs
    return Work(
        case.tokens * case.outputs * case.size,
        9 * flags,
        launches=LAUNCHES["compact_indices"],
        occupancy=occupancy,
    )


def selection(case: Case, occupancy: float) -> Work:
    """Two reads of the gradient, the second of what was just read, and k entries written."""
    read = case.rotated * case.size
    return Work(
        read,
        read + case.k * (16 + case.size),
        launches=LAUNCHES["topk_coo"],
        occupancy=occupancy,
    )


def grad_input(case: Case) -> Work:
    """`[R, out] @ [out, in]` over the nonzero tokens, and zeros for the others."""
    work = matmul(case, case.rows, case.inputs, case.outputs, TRITON, "a")
    zeros = (case.tokens - case.rows) * case.inputs * case.size
    return replace(work, cold=work.cold + zeros)


def adam(case: Case, occupancy: float) -> Work:
    """Three matrices read and written by sectors, indices and values read."""
    touched = 6 * sectors(case)
    entries = case.k * (16 + case.size)
    return Work(touched, entries, launches=LAUNCHES["sparse_adam_"], occupancy=occupancy)


def fold(case: Case) -> list[Work]:
    """`(V^T D~) U` or `V^T (D~ U)`, one launch: its entries sorted, k rows of one basis added up,
    then a product with the other, or, with one basis alone, the sums added to the weight."""
    sides = (case.outputs, case.rank_out, case.rank_in), (case.inputs, case.rank_in, case.rank_out)
    width, rank, depth = min(sides, key=lambda s: case.k * s[0] + s[2] * case.weight)
    if case.smaller:
        width = rank = min(case.inputs, case.outputs)
        depth = max(case.inputs, case.outputs)
    parts = min(128, ceil(case.k / 256))
    # Keys are read twice, the entries once, and written; counts are filled, added to, made places.
    counts = 8 * depth * parts
    moved = case.k * (8 + 16 + case.size + 4 + case.size) + 5 * counts
    sort = Work(0, moved, launches=LAUNCHES["fold_"], waits=3)
    sums = Work(
        0,
        case.k * width * case.size,
        2 * case.k * width,
        RATE["fp32"],
        launches=0,
        resident=rank * width * case.size,
        waits=1,
    )
    if case.smaller:
        return [sort, replace(sums, cold=2 * case.weight * case.size)]
    product = matmul(case, width, case.weight // width, depth, TRITON, "a")
    return [sort, sums, replace(product, cold=product.cold + case.weight * case.size, launches=0)]


def rotated_gradient(case: Case) -> list[Work]:
    """`V g^T x U^T` over the nonzero tokens, associated the cheapest way, as the layer does."""
    rows, n_in, n_out = case.rows, case.inputs, case.outputs
    r_in, r_out = case.rank_in, case.rank_out
    if case.smaller:
        size, is_in = min(n_in, n_out), n_in <= n_out
        orders = (
            [(rows, size, size, "c" if is_in else "ac"), (n_out, n_in, rows, "abc")],
            [(n_out, n_in, rows, "ac"), (n_out, n_in, size, "ac" if is_in else "bc")],
        )
        cheapest = min(orders, key=lambda order: sum(m * n * depth for m, n, depth, _ in order))
        return [matmul(case, m, n, depth, TRITON, warm) for m, n, depth, warm in cheapest]
    orders = (  # products `[m, depth] @ [depth, n]` as (m, n, depth), and which are warm
        [(rows, r_out, n_out, "ac"), (rows, r_in, n_in, "c"), (r_out, r_in, rows, "abc")],
        [(n_out, n_in, rows, "ac"), (n_out, r_in, n_in, "ac"), (r_out, r_in, n_out, "bc")],
        [(n_out, n_in, rows, "ac"), (r_out, n_in, n_out, "bc"), (r_out, r_in, n_in, "ac")],
        [(rows, r_out, n_out, "ac"), (r_out, n_in, rows, "ac"), (r_out, r_in, n_in, "ac")],
        [(rows, r_in, n_in, "c"), (n_out, r_in, rows, "abc"), (r_out, r_in, n_out, "bc")],
    )
    cheapest = min(orders, key=lambda order: sum(m * n * depth for m, n, depth, _ in order))
    return [matmul(case, m, n, depth, TRITON, warm) for m, n, depth, warm in cheapest]


def operators(case: Case, occupancy: dict[str, float]) -> dict[str, list[Work]]:
    """The eight, on the gradient `g [T, out]`, the input `x [T, in]` and the weight `[out, in]`."""
    detect = detection(case, occupancy.get("compact_indices", 1))
    select = selection(case, occupancy.get("topk_coo", 1))
    product = grad_input(case)
    coo = matmul(case, case.rows, case.inputs, case.outputs, TRITON)
    coo = replace(coo, cold=coo.cold + 16 * case.rows * case.inputs, launches=coo.launches + 1)
    grad_weight = matmul(case, case.outputs, case.inputs, case.rows, TRITON, "c")
    return {
        "nonzero_rows_cols": [replace(detect, host_reads=1)],
        "compact_indices": [detect],
        "sparse_dense_mm": [detect, product],
        "sparse_dense_mm_coo": [detect, replace(coo, host_reads=1)],
        "topk_coo": [select],
        "grad_weight_topk": [detect, grad_weight, replace(select, cold=0, warm=2 * select.cold)],
        "sparse_adam_": [adam(case, occupancy.get("sparse_adam_", 1))],
        "fold_": fold(case),
    }


def steps(case: Case, occupancy: dict[str, float]) -> dict[str, dict[str, list[Work]]]:
    """Each method's step of this layer, by phase: with the full basis and a truncated one."""
    forward = matmul(case, case.tokens, case.outputs, case.inputs, LIBRARY, "ac")
    dense_input = matmul(case, case.tokens, case.inputs, case.outputs, LIBRARY, "ac")
    bias = Work(0, case.tokens * case.outputs * case.size)
    ops = operators(case, occupancy)
    detect, product = ops["sparse_dense_mm"]
    detect = replace(detect, cold=0, warm=detect.cold + detect.warm)
    select = replace(ops["topk_coo"][0], cold=0, warm=2 * case.rotated * case.size)
    skinny = [
        matmul(case, case.tokens, width, RANK, LIBRARY, "ac")
        for width in (case.inputs, case.outputs)
    ]
    adamw = Work(7 * case.weight * case.size)  # p, m, v read and written, g read
    ours = {
        "forward": [forward],
        "grad input": [detect, product],
        "gradient, rotated": [*rotated_gradient(case), bias],
        "selection": [select],
        "Adam": ops["sparse_adam_"],
        "fold": ops["fold_"],
    }
    if case.kept < 1:
        return {f"SparseGrad, {case.kept**2:.0%}": ours}
    if case.smaller:
        return {"SparseGrad, smaller modes": ours}
    return {
        "SparseGrad": ours,
        **steps(replace(case, kept=TRUNCATED), occupancy),
        **steps(replace(case, smaller=True), occupancy),
        "dense + AdamW": {
            "forward": [forward],
            "grad input": [dense_input],
            "grad weight": [
                matmul(case, case.outputs, case.inputs, case.tokens, LIBRARY, "abc"),
                bias,
            ],
            "AdamW": [adamw],
        },
        # x A^T, (.) B^T and their sum with the output; g B, its product with A and its sum with the
        # gradient of the input, and the gradients of A and B: each reads one tall matrix.
        f"LoRA r={RANK}": {
            "forward": [forward, *skinny, bias],
            "grad input": [dense_input, *skinny, skinny[0]],
            "grad A, B": skinny,
            "AdamW": [Work(7 * RANK * (case.inputs + case.outputs) * case.size)],
        },
    }


def total(works: Iterable[Work], state: str = "mixed") -> float:
    return sum(work.seconds(state) for work in works)


def eager(works: list[Work]) -> float:
    """Without a graph: the device's sum or the host's, whichever is longer."""
    return max(total(works), HOST_LAUNCH * sum(work.launches for work in works))


def predict(case: Case, occupancy: dict[str, float]) -> dict:
    """Everything in microseconds."""
    methods = {}
    for method, phases in steps(case, occupancy).items():
        works = [work for phase in phases.values() for work in phase]
        methods[method] = {
            "phases": {name: 1e6 * total(phase) for name, phase in phases.items()},
            "graph": 1e6 * total(works),
            "eager": 1e6 * eager(works),
        }
    ops = {
        op: {state: 1e6 * total(works, state) for state in ("cold", "warm")}
        for op, works in operators(case, occupancy).items()
    }
    return {"case": asdict(case), "operators": ops, "step": methods}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(predictions: list[dict]) -> str:
    names = [p["case"]["name"] for p in predictions]
    ops = [
        [
            f"`{op}`",
            *(" / ".join(f"{t:.3g}" for t in p["operators"][op].values()) for p in predictions),
        ]
        for op in predictions[0]["operators"]
    ]
    rows = []
    for method, first in predictions[0]["step"].items():
        for phase in first["phases"]:
            times = [f"{p['step'][method]['phases'][phase]:.3g}" for p in predictions]
            rows.append([f"{method}: {phase}", *times])
        for kind in ("graph", "eager"):
            times = [f"**{p['step'][method][kind]:.3g}**" for p in predictions]
            rows.append([f"**{method}, {kind}**", *times])
        if not method.startswith("SparseGrad"):
            for ours in ("SparseGrad", "SparseGrad, smaller modes"):
                ratios = [
                    f"{p['step'][method]['graph'] / p['step'][ours]['graph']:.2f}x"
                    for p in predictions
                ]
                rows.append([f"{method} / {ours}, graph", *ratios])
    return f"""# What an H100 should take: a prediction

`python benchmarks/time_model.py`, which explains each term and assumption. Nothing was measured.
Columns: layer, tokens, share of tokens with a gradient, density; bfloat16 unless tf32 is said.

## Operators, microseconds in a CUDA graph, cold / warm L2

{table(["operator", *names], ops)}

`nonzero_rows_cols` and `sparse_dense_mm_coo` include one read by the host. `grad_weight_topk` is
its exact path, which writes the dense gradient and selects from it.

## One layer's step, microseconds

{table(["", *names], rows)}

"graph" is the device's time; "eager" the host's, {1e6 * HOST_LAUNCH:.0f} us for each launch, where
that is longer.
"""


def cases() -> list[Case]:
    roberta = [
        Case(f"{i} -> {o}, 4096, {share:.0%}, 1%", i, o, 4096, share, 0.01)
        for i, o in ((768, 3072), (3072, 768))
        for share in (0.09, 0.5, 1.0)
    ]
    single = replace(roberta[1], name=f"tf32: {roberta[1].name}", size=4, rate="tf32")
    return [
        *roberta,
        single,
        Case("4096 -> 11008, 2048, 100%, 0.2%", 4096, 11008, 2048, 1.0, 0.002),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two files")
    out = parser.parse_args().out
    occupancy = occupancies(RESULTS / "triton_resources.json")
    predictions = [predict(case, occupancy) for case in cases()]
    constants = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, int | float)}
    out.mkdir(parents=True, exist_ok=True)
    found = {"constants": constants, "occupancy": occupancy, "predictions": predictions}
    (out / "time_model.json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(predictions)
    (out / "time_model.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
