"""Speed of the CPU kernels as ratios to their peers, measured in one run.

python benchmarks/compare_cpu.py [--threads 2] [--repeats 21]

The linear is BERT-base's 768 -> 3072 in float32; 48% of 2048 tokens have a gradient, k is 1%. Peers
take turns, each figure is a median, and results are checked before anything is timed. "bound" is
what a figure cannot beat, as a multiple of it: one read of the input, or torch's dense product of
what is not zero.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch
from measure import Run, medians
from peers import any_nonzero, torch_topk
from steps import Steps, random_basis
from torch import Tensor, nn

from sparsegrad_kernels import ops

IN, OUT, TOKENS = 768, 3072, 2048
K = IN * OUT // 100


def report(what: str, at_least: float, aim: float, times: dict[str, float]) -> None:
    """Rows of the table; `times` has "ours", "peer" and perhaps "bound"."""
    ratio = times["peer"] / times["ours"]
    bound = f"{times['ours'] / times['bound']:.2f}" if "bound" in times else ""
    milliseconds = f"{1e3 * times['ours']:.2f} / {1e3 * times['peer']:.2f}"
    verdict = "aim" if ratio >= aim else "enough" if ratio >= at_least else "BELOW"
    print(
        f"| {what} | {at_least}x | {aim}x | {ratio:.2f}x | {milliseconds} | {bound} | {verdict} |",
        flush=True,
    )


def peak_bytes(run: Run) -> int:
    """Growth of the process's peak resident memory during a run."""
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def field(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(name)[2].split()[0]) * 1024

    before = field("VmRSS:")
    run()
    return field("VmHWM:") - before


def output_gradient(tokens: int, share: float, generator: torch.Generator) -> Tensor:
    g = torch.randn(tokens, OUT, generator=generator)
    return g * (torch.rand(tokens, 1, generator=generator) < share)


def compare_operators(repeats: int, generator: torch.Generator) -> None:
    for shape, at_least, aim in (((OUT, IN), 6, 10), ((11008, 4096), 6, 15)):
        c = torch.randn(shape, generator=generator)
        k = c.numel() // 100
        for got, wanted in zip(ops.topk_coo(c, k), torch_topk(c, k), strict=True):
            assert torch.equal(got, wanted)
        runs = {
            "ours": lambda c=c, k=k: ops.topk_coo(c, k),
            "peer": lambda c=c, k=k: torch_topk(c, k),
            "bound": lambda c=c: c.sum(),
        }
        few = repeats if c.numel() < 10**7 else max(3, repeats // 4)
        report(f"topk_coo {shape[0]}x{shape[1]}", at_least, aim, medians(runs, few))

    g = output_gradient(TOKENS, 0.48, generator)
    x, weight = (torch.randn(n, IN, generator=generator) for n in (TOKENS, OUT))

    rows = any_nonzero(g)[0]
    for got, wanted in zip(ops.nonzero_rows_cols(g), any_nonzero(g), strict=True):
        assert torch.equal(got, wanted)
    runs = {
        "ours": lambda: ops.nonzero_rows_cols(g),
        "peer": lambda: any_nonzero(g),
        "bound": g.sum,
    }
    report("nonzero_rows_cols", 4, 10, medians(runs, repeats))

    torch.testing.assert_close(ops.sparse_dense_mm(g, weight), g @ weight)
    packed = g[rows]
    runs = {
        "ours": lambda: ops.sparse_dense_mm(g, weight),
        "peer": lambda: g @ weight,
        "bound": lambda: packed @ weight,
    }
    report("sparse_dense_mm", 1.7, 1.95, medians(runs, repeats))

    packed_x = x[rows]
    dense = g.T @ x
    indices, values = ops.grad_weight_topk(g, x, K)
    torch.testing.assert_close(values, dense[indices[0], indices[1]], rtol=1e-4, atol=1e-3)
    runs = {
        "ours": lambda: ops.grad_weight_topk(g, x, K),
        "peer": lambda: torch_topk(g.T @ x, K),
        "bound": lambda: packed.T @ packed_x,
    }
    report("grad_weight_topk", 2.2, 2.5, medians(runs, repeats))
    peaks = {name: peak_bytes(runs[name]) for name in ("ours", "peer")}
    print(
        f"| its peak memory | 10x less | | {peaks['peer'] / max(1, peaks['ours']):.1f}x less | "
        f"{peaks['ours'] / 2**20:.1f} / {peaks['peer'] / 2**20:.1f} MiB | | |"
    )

    param = nn.Parameter(weight.clone())
    param.grad = torch.sparse_coo_tensor(
        indices, values, weight.shape, is_coalesced=True, check_invariants=False
    )
    peer = torch.optim.SparseAdam([param], lr=1e-3)
    state = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    peer.step()
    ops.sparse_adam_(*state, indices, values, 1, 1e-3, 0.9, 0.999, 1e-8)
    torch.testing.assert_close(state[0], param.detach(), rtol=1e-6, atol=1e-6)
    runs = {
        "ours": lambda: ops.sparse_adam_(*state, indices, values, 2, 1e-3, 0.9, 0.999, 1e-8),
        "peer": peer.step,
    }
    report("sparse_adam_", 10, 20, medians(runs, 4 * repeats))


def compare_steps(repeats: int, generator: torch.Generator) -> None:
    full = random_basis(IN, OUT, generator, torch.device("cpu"))
    short = full.truncate(rank_in=196, rank_out=919)
    smaller = full.select(True, False)

    steps = Steps(TOKENS, 0.48, generator)
    runs = {
        "full": steps.sparsegrad(full),
        "short": steps.sparsegrad(short),
        "smaller": steps.sparsegrad(smaller),
        "lora": steps.lora(),
        "paper": steps.paper(full),
        "dense": steps.dense(),
    }
    times = medians(runs, repeats)
    for what, at_least, aim, ours, peer in (
        ("step against the paper's three linears", 2.5, 3.5, "full", "paper"),
        ("step, full basis, against nn.Linear + AdamW", 0.75, 1.0, "full", "dense"),
        ("step, basis 919x196, against nn.Linear + AdamW", 1.4, 1.6, "short", "dense"),
        ("step, basis of the input, against nn.Linear + AdamW", 1.2, 1.4, "smaller", "dense"),
        ("step, basis of the input, against LoRA r=7", 0.9, 1.0, "smaller", "lora"),
    ):
        report(what, at_least, aim, {"ours": times[ours], "peer": times[peer]})

    steps = Steps(4 * TOKENS, 0.48, generator)
    runs = {"ours": steps.sparsegrad(full), "peer": steps.dense()}
    report("the second at 8192 tokens", 1.0, 1.0, medians(runs, max(3, repeats // 2)))

    steps = Steps(4096, 0.09, generator)
    runs = {
        "full basis": steps.sparsegrad(full),
        "basis of the input": steps.sparsegrad(smaller),
        "dense": steps.dense(),
        "lora": steps.lora(),
    }
    times = medians(runs, repeats)
    for ours, peer, at_least, aim in (
        ("full basis", "dense", 1.3, 1.6),
        ("full basis", "lora", 1.0, 1.1),
        ("basis of the input", "dense", 1.6, 1.9),
        ("basis of the input", "lora", 1.4, 1.6),
    ):
        name = "nn.Linear + AdamW" if peer == "dense" else "LoRA r=7"
        what = f"padding to 128, 4096 tokens, 9% nonzero, {ours}, against {name}"
        report(what, at_least, aim, {"ours": times[ours], "peer": times[peer]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} repeats")
    print("| measure | at least | aim | measured | ms, ours / peer | ours / bound | |")
    print("|---|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    compare_operators(arguments.repeats, generator)
    compare_steps(arguments.repeats, generator)


if __name__ == "__main__":
    main()
