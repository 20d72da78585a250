"""Compile every Triton kernel in every configuration for the targets, with no GPU at hand.

python benchmarks/compile_triton.py [--only OP] [--targets cuda:90] [--quick] [--out DIR]

Writes `triton_resources.json` and `.md`: registers, spills, shared memory and occupancy of each.
Exits with 1, naming each, where a configuration does not compile, spills, or needs more shared
memory than its target has.

What is compiled is each module's list `AOT` of `(kernel, signature, constexprs, options)`. A launch
specialises on more than that: on pointers and integers that are multiples of 16, which decides how
wide loads are and whether they are pipelined through shared memory. So each is compiled twice,
"aligned" (all are) and "any" (none is). The second has many more addresses to hold; it has to
compile and to fit, and what it spills is only recorded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpu_targets import KB, TARGETS, Target, Usage, blocks_per_multiprocessor
from triton import knobs
from triton.compiler import ASTSource

import sparsegrad_kernels

RESULTS = Path(__file__).parent / "results"
MODULES = Path(sparsegrad_kernels.__file__).parent / "_triton"
VARIANTS = ("aligned", "any")
DTYPES = ("fp32", "bf16", "fp16", "fp64")


class Entry(NamedTuple):
    """One item of a module's `AOT`."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


def modules() -> list[str]:
    return sorted(path.stem for path in MODULES.glob("[!_]*.py"))


@cache
def entries(module: str) -> list[Entry]:
    """A module's list, each item once, the kernels without their autotuners."""
    imported = importlib.import_module(f"sparsegrad_kernels._triton.{module}")
    unique = {}
    for kernel, signature, constexprs, options in getattr(imported, "AOT", ()):
        while not isinstance(kernel, triton.JITFunction):
            kernel = kernel.fn
        # An integer among the constants is one that a launch specialises on: a stride of 1.
        runtime = {name: kind for name, kind in signature.items() if name not in constexprs}
        whole = {name: runtime.get(name, "constexpr") for name in kernel.arg_names}
        entry = Entry(kernel, whole, constexprs, options)
        unique[repr(entry)] = entry
    return list(unique.values())


def dtype_of(entry: Entry) -> str:
    """The element type by which configurations are grouped: the first floating pointer's."""
    for kind in entry.signature.values():
        if kind.removeprefix("*") in DTYPES and kind.startswith("*"):
            return kind[1:]
    return "-"


def configuration(entry: Entry) -> str:
    """Constants and options, in words."""
    constants = [f"{name}={value}" for name, value in entry.constexprs.items()]
    return " ".join(constants + [f"{name}={value}" for name, value in entry.options.items()])


def divisible(entry: Entry) -> dict[tuple[int, ...], list[list[Any]]]:
    """Attributes that say of every pointer and integer that it is a multiple of 16."""
    return {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(entry.signature.values())
        if kind.startswith("*") or re.fullmatch(r"[iu](32|64)", kind)
    }


def compile_entry(entry: Entry, target: Target, variant: str) -> Any:
    attributes = divisible(entry) if variant == "aligned" else {}
    source = ASTSource(entry.kernel, entry.signature, entry.constexprs, attributes)
    return triton.compile(source, target=target.gpu, options=entry.options)


def usage(compiled: Any) -> Usage:
    if "cubin" in compiled.asm:
        registers, stack = _cubin_usage(compiled)
    else:
        assembly = compiled.asm["amdgcn"]
        fields = dict(re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
        # gfx942 has accumulation registers in the same file; `vgpr_count` counts both.
        registers, stack = int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])
        # Scalar registers that do not fit go to lanes of vector registers, not to memory.
        stack = max(stack, 4 * int(fields["vgpr_spill_count"]))
    metadata = compiled.metadata
    return Usage(registers, stack, metadata.shared, getattr(metadata, "tmem_size", 0) or 0)


def _cubin_usage(compiled: Any) -> tuple[int, int]:
    """Registers, and bytes that spill."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text = _run_tool("cuobjdump", "--dump-resource-usage", str(cubin))
        fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
        stack = int(fields["STACK"]) + int(fields["LOCAL"])
        if stack == 0:
            return int(fields["REG"]), 0
        # A stack may hold other things than registers: the assembler tells.
        ptx.write_text(compiled.asm["ptx"])
        name = compiled.metadata.target.arch
        tool = (
            "ptxas_blackwell"
            if name >= 100 and hasattr(knobs.nvidia, "ptxas_blackwell")
            else "ptxas"
        )
        architecture = f"--gpu-name=sm_{name}{'a' if name >= 90 else ''}"
        text = _run_tool(tool, "-v", architecture, "-o", os.devnull, str(ptx))
        spilled = re.findall(r"(\d+) bytes spill stores", text)
        return int(fields["REG"]), int(spilled[0]) if spilled else stack


def _run_tool(tool: str, *arguments: str) -> str:
    command = [getattr(knobs.nvidia, tool).path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def measure(entry: Entry, target: Target, variant: str) -> dict[str, Any]:
    """Compile one; what it uses, and what is wrong with it."""
    try:
        used = usage(compile_entry(entry, target, variant))
    except Exception as error:  # a kernel's failure, whatever it is, belongs in the table
        lines = str(error).replace("^", "").strip().splitlines() or [""]
        return {"problems": [f"does not compile: {type(error).__name__}: {lines[-1]}"]}
    warps = entry.options.get("num_warps", 4)
    blocks, bound = blocks_per_multiprocessor(target, used, warps)
    problems = []
    if used.stack and variant == "aligned":
        problems.append(f"spills: {used.stack} bytes of a thread")
    if used.shared > target.shared_per_block:
        problems.append(f"{used.shared} bytes of shared memory of {target.shared_per_block}")
    if not blocks and not problems:
        problems.append(f"no block fits: {bound}")
    return {
        **used._asdict(),
        "blocks": blocks,
        "occupancy": blocks * warps / target.warps,
        "bound_by": bound,
        "problems": problems,
    }


class Job(NamedTuple):
    module: str
    index: int
    target: str
    variant: str


def _run(job: Job) -> dict[str, Any]:
    start = time.perf_counter()
    entry = entries(job.module)[job.index]
    record = {
        "op": job.module,
        "kernel": entry.kernel.__name__,
        "dtype": dtype_of(entry),
        "signature": {k: v for k, v in entry.signature.items() if v != "constexpr"},
        "constexprs": {
            k: v if isinstance(v, int | float) else str(v) for k, v in entry.constexprs.items()
        },
        "options": entry.options,
        "configuration": configuration(entry),
        "target": job.target,
        "variant": job.variant,
        **measure(entry, TARGETS[job.target], job.variant),
    }
    return {**record, "seconds": time.perf_counter() - start}


def quick(jobs: list[Job]) -> list[Job]:
    """One element type of each kernel's configuration, aligned."""
    chosen = {}
    for job in jobs:
        entry = entries(job.module)[job.index]
        if job.variant == VARIANTS[0]:
            key = (job.module, job.target, entry.kernel.__name__, configuration(entry))
            chosen.setdefault(key, job)
    return list(chosen.values())


def compile_all(jobs: list[Job], workers: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # nothing is taken from an earlier run
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            return list(pool.map(_run, jobs, chunksize=4))


def failures(records: list[dict[str, Any]]) -> list[str]:
    return [
        f"{r['op']}.{r['kernel']} {r['dtype']} [{r['configuration']}] "
        f"{r['target']} {r['variant']}: {'; '.join(r['problems'])}"
        for r in records
        if r["problems"]
    ]


def _cell(records: list[dict[str, Any]]) -> str:
    """The most that any of them asks for: registers, KB of shared memory, blocks, occupancy."""
    if not records:
        return ""
    if any(r["problems"] for r in records):
        return "FAILS"
    records = [r for r in records if r["variant"] == "aligned"] or records
    registers, shared = (max(r[name] for r in records) for name in ("registers", "shared"))
    worst = min(records, key=lambda r: r["occupancy"])
    return f"{registers} / {shared / KB:.3g} / {worst['blocks']} / {worst['occupancy']:.0%}"


def markdown(records: list[dict[str, Any]], header: dict[str, Any]) -> str:
    """A row for each kernel's configuration, over its element types and both variants."""
    targets = list(dict.fromkeys(r["target"] for r in records))
    lines = [
        "# What the Triton kernels ask for",
        "",
        "`python benchmarks/compile_triton.py`; "
        + ", ".join(f"{name} {version}" for name, version in header.items())
        + ". Nothing was run: compiled ahead of time, pointers and strides multiples of 16.",
        "Cells: registers of a thread / KB of shared memory of a block / blocks on a processor / "
        "occupancy; the worst of a row's types. FAILS: not compiled, spills, or does not fit.",
        "",
        "| kernel | configuration | types | " + " | ".join(targets) + " |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        name = f"{record['op']}.{record['kernel']}"
        rows.setdefault((name, record["configuration"]), []).append(record)
    for (name, text), group in rows.items():
        dtypes = [dtype for dtype in (*DTYPES, "-") if any(r["dtype"] == dtype for r in group)]
        cells = [_cell([r for r in group if r["target"] == target]) for target in targets]
        lines.append(f"| {name} | {text} | {' '.join(dtypes)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=modules(), default=modules(), metavar="OP")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="one element type, aligned only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two files")
    arguments = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 compiles nothing")

    jobs = [
        Job(module, index, target, variant)
        for module in arguments.only
        for index in range(len(entries(module)))
        for target in arguments.targets
        for variant in VARIANTS
    ]
    if arguments.quick:
        jobs = quick(jobs)
    start = time.perf_counter()
    records = compile_all(jobs, arguments.workers)
    elapsed = time.perf_counter() - start

    header = {"triton": triton.__version__, "torch": torch.__version__}
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    lines = ",\n".join(json.dumps(record) for record in kept)
    head = json.dumps({"versions": header, "limits": {n: asdict(t) for n, t in TARGETS.items()}})
    (arguments.out / "triton_resources.json").write_text(
        f'{head[:-1]},\n"kernels": [\n{lines}\n]}}\n'
    )
    (arguments.out / "triton_resources.md").write_text(markdown(records, header))

    slowest = max(records, key=lambda r: r["seconds"], default=None)
    print(f"{len(records)} compiled in {elapsed:.0f} s", end="")
    if slowest:
        print(
            f", the slowest {slowest['seconds']:.1f} s: {slowest['op']} {slowest['configuration']}"
        )
    wrong = failures(records)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} failures")


if __name__ == "__main__":
    main()
