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
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from sparsegrad_kernels import Basis, SparseAdam, SparseGradLinear, ops

IN, OUT, TOKENS = 768, 3072, 2048
K = IN * OUT // 100
Run = Callable[[], object]


def medians(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Seconds; the runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


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


def torch_topk(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = c.flatten()
    linear = flat.abs().topk(k).indices.sort().values
    return torch.stack([linear // c.shape[1], linear % c.shape[1]]), flat[linear]


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

    def any_any() -> tuple[Tensor, Tensor]:
        return (g != 0).any(1).nonzero()[:, 0], (g != 0).any(0).nonzero()[:, 0]

    rows = any_any()[0]
    for got, wanted in zip(ops.nonzero_rows_cols(g), any_any(), strict=True):
        assert torch.equal(got, wanted)
    runs = {"ours": lambda: ops.nonzero_rows_cols(g), "peer": any_any, "bound": g.sum}
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


class PaperLinear(torch.autograd.Function):
    """The paper's Table 2: three products forward, and in the transformed space backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, u, v):
        rotated = x @ u.T
        ctx.save_for_backward(rotated, weight, u, v)
        return rotated @ weight.T @ v + bias

    @staticmethod
    def backward(ctx, g):
        rotated, weight, u, v = ctx.saved_tensors
        g_rotated = g @ v.T
        grad = torch.sparse_coo_tensor(
            *torch_topk(g_rotated.T @ rotated, K), weight.shape, check_invariants=False
        )
        return g_rotated @ weight @ u, grad, g.sum(0), None, None


class Steps:
    """Forward, backward and optimizer step of one linear, by each method, on the same input."""

    def __init__(self, tokens: int, share: float, generator: torch.Generator) -> None:
        self.x = torch.randn(tokens, IN, generator=generator).requires_grad_()
        self.g = output_gradient(tokens, share, generator)
        self.linear = nn.Linear(IN, OUT)

    def run(self, forward: Callable[[Tensor], Tensor], *optimizers: torch.optim.Optimizer) -> Run:
        def step() -> None:
            self.x.grad = None
            forward(self.x).backward(self.g)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    def sparsegrad(self, basis: Basis) -> Run:
        layer = SparseGradLinear.from_linear(self.linear, basis, k=K)
        self.check(layer, basis)
        return self.run(layer, SparseAdam(layer.parameters(), lr=1e-6))

    def check(self, layer: SparseGradLinear, basis: Basis) -> None:
        self.x.grad = None
        layer(self.x).backward(self.g)
        dense = basis.v @ (self.g.T @ self.x.detach()) @ basis.u.T
        grad = layer.delta.grad.coalesce()
        at = grad.indices()
        torch.testing.assert_close(grad.values(), dense[at[0], at[1]], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(self.x.grad, self.g @ self.linear.weight, rtol=1e-4, atol=1e-4)
        layer.zero_grad()

    def paper(self, basis: Basis) -> Run:
        with torch.no_grad():
            weight = nn.Parameter(basis.v @ self.linear.weight @ basis.u.T)
        bias = nn.Parameter(self.linear.bias.detach().clone())

        def forward(x: Tensor) -> Tensor:
            return PaperLinear.apply(x, weight, bias, basis.u, basis.v)

        optimizers = torch.optim.SparseAdam([weight], lr=1e-6), torch.optim.AdamW([bias], lr=1e-6)
        return self.run(forward, *optimizers)

    def dense(self) -> Run:
        linear = nn.Linear(IN, OUT)
        return self.run(linear, torch.optim.AdamW(linear.parameters(), lr=1e-6, fused=True))

    def lora(self) -> Run:
        config = peft.LoraConfig(r=7, target_modules=["0"], lora_dropout=0.0)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        return self.run(model, torch.optim.AdamW(trained, lr=1e-6, fused=True))


def compare_steps(repeats: int, generator: torch.Generator) -> None:
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].float()
        for n in (IN, OUT)
    )
    full = Basis(u, v, torch.ones(IN), torch.ones(OUT))
    short = Basis(u[:196].clone(), v[:919].clone(), torch.ones(IN), torch.ones(OUT))

    steps = Steps(TOKENS, 0.48, generator)
    runs = {
        "full": steps.sparsegrad(full),
        "short": steps.sparsegrad(short),
        "paper": steps.paper(full),
        "dense": steps.dense(),
    }
    times = medians(runs, repeats)
    for what, at_least, aim, ours, peer in (
        ("step against the paper's three linears", 2.5, 3.5, "full", "paper"),
        ("step, full basis, against nn.Linear + AdamW", 0.75, 1.0, "full", "dense"),
        ("step, basis 919x196, against nn.Linear + AdamW", 1.4, 1.6, "short", "dense"),
    ):
        report(what, at_least, aim, {"ours": times[ours], "peer": times[peer]})

    steps = Steps(4 * TOKENS, 0.48, generator)
    runs = {"ours": steps.sparsegrad(full), "peer": steps.dense()}
    report("the second at 8192 tokens", 1.0, 1.0, medians(runs, max(3, repeats // 2)))

    steps = Steps(4096, 0.09, generator)
    runs = {"ours": steps.sparsegrad(full), "dense": steps.dense(), "lora": steps.lora()}
    times = medians(runs, repeats)
    for peer, at_least, aim in (("dense", 1.3, 1.6), ("lora", 1.0, 1.1)):
        name = "nn.Linear + AdamW" if peer == "dense" else "LoRA r=7"
        what = f"padding to 128, 4096 tokens, 9% nonzero, full basis, against {name}"
        report(what, at_least, aim, {"ours": times["ours"], "peer": times[peer]})


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
