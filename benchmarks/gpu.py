"""Builds, tests, sanitizes and times everything on a GPU, in one run of under 10 minutes.

    python benchmarks/gpu.py [--only tests|sanitizer|micro|training] [--device cpu] [--wheels DIR]
                             [--seconds 570] [--backends cuda triton] [--cases EXPRESSION]

No network is needed. The package is built as by `pip install --no-build-isolation --no-deps .`, for
the card that is there, and installed with the wheels of DIR (for what the machine lacks, as
tensorly) in a folder of its own, `build/gpu`: the environment is left as it is. A build, a test or
a sanitizer that fails ends the run. What is known by then is written after every stage to
benchmarks/results/<card>-<date>-<commit>.json and .md, with the benchmarks' own files beside it;
all output is in build/gpu.log (with --out DIR all of this is in DIR: 9 files at most).

`--device cpu` runs the same steps on CPU tensors with small sizes. What needs a GPU (the CUDA and
Triton backends, compute-sanitizer) is left out: it proves this script and the tests, not kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import gpu_report
import torch
from gpu_steps import Outcome, Step, run_stage

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
LOGS = ROOT / "build" / "gpu-logs"
PARTS = ("tests", "sanitizer", "micro", "training")
BUDGET = 570  # seconds of the 10 minutes that a command may take on the machine
PYTEST = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SIDE_BY_SIDE = importlib.util.find_spec("xdist") is not None
SANITIZER_FAILED = "86"
CPU_TESTS = "the rest, CPU"
# Of the GPU, or of what a machine without one, or with the packaged models, is like.
NOT_ON_CPU = {"build", "cuda", "triton_cuda", "triton", "backends", "finetune", "finetune_data"}
NOT_ON_CPU |= {"cpp_fuzz", "screened_topk", "select"}  # of the C++ kernels alone, and long
Stage = list[Step]
FAILURE = ("failed", "timed out", "not run")

# What must be loaded for the backends to have been tested at all.
LOADED = """
import json, sparsegrad_kernels as s
found = {{name: (b.loaded, b.reason) for name, b in s.backends().items()}}
print(json.dumps(found, indent=1))
assert s.__file__.startswith({site!r}), s.__file__
assert all(found[name][0] for name in {wanted!r}), "not loaded"
"""

# Every check of an argument is an exception thrown from a library that was built here. With a
# compiler whose runtime does not go with torch's that is a crash, of all tests of bad input.
RAISED = """
import torch
for name, backend in __import__("sparsegrad_kernels").backends().items():
    if name in {wanted!r}:
        c = torch.ones(2, 2, device="cpu" if name == "cpp" else "cuda")
        try:
            torch.ops.sparsegrad_kernels.topk_coo(c, 0)
        except RuntimeError as error:
            print(name, "raised:", str(error).partition("\\n")[0])
        else:
            raise SystemExit(f"{{name}} raised nothing")
"""
COMPILER = r"""
${{CXX:-c++}} --version | head -1
for library in {site}/sparsegrad_kernels/*.so; do readelf -d $library | grep NEEDED; done
ldconfig -p | grep -E 'libstdc|libgcc_s'
"""


def build(device: str, wheels: Path | None) -> list[Stage]:
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--quiet"]
    install += ["--disable-pip-version-check", "--target", str(SITE)]
    environment = {"SPARSEGRAD_BUILD": "cpu"}
    wanted = ["cpp"]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        card = f"{major}.{minor}{'a' if major >= 9 else ''}"
        # Sanitizers name source lines.
        environment = {
            "SPARSEGRAD_BUILD": "cuda",
            "TORCH_CUDA_ARCH_LIST": card,
            "NVCC_APPEND_FLAGS": "-lineinfo",
        }
        wanted = ["cpp", "cuda", "triton"]
    check = LOADED.format(site=str(SITE), wanted=wanted)
    raised = RAISED.format(wanted=[name for name in wanted if name != "triton"])
    stages = [
        [
            Step(
                "build",
                [*install, "--no-build-isolation", str(ROOT)],
                240,
                environment,
                (),
                FAILURE,
            )
        ],
        [Step("backends", [sys.executable, "-P", "-c", check], 60, ends_run=FAILURE)],
        [
            Step("compiler", ["bash", "-c", COMPILER.format(site=SITE)], 20),
            Step("errors are raised", [sys.executable, "-P", "-c", raised], 60),
        ],
    ]
    files = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    if files:
        stages.insert(0, [Step("wheels", [*install, "--no-index", *files], 60, ends_run=FAILURE)])
    return stages


def tests(device: str, backends: Sequence[str]) -> list[Stage]:
    """Each backend on the device, and the CPU's own tests, side by side."""
    everything = "python_tests/test_cuda.py"
    triton = "python_tests/test_triton_cuda.py"

    def step(name: str, backend: str | None, *arguments: str, processes: int = 1) -> Step:
        environment = {"SPARSEGRAD_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
        if SIDE_BY_SIDE and processes > 1:
            arguments = (*arguments, "-n", str(processes))
        if backend:
            environment["SPARSEGRAD_BACKEND"] = backend
        needs = [path for path in arguments if path.endswith(".py")]
        # What fails on the CPU says nothing about the GPU.
        ends = () if name == CPU_TESTS else ["failed"]
        seconds = 130 if name == CPU_TESTS and device == "cuda" else 180
        return Step(f"tests: {name}", [*PYTEST, *arguments], seconds, environment, needs, ends)

    if device == "cpu":
        small = ["-k", "small or graph or waits or stream"]
        stage = [step("reference", "reference", everything, *small)]
        stage.append(step("C++", "cpp", everything, *small))
        stage.append(step(CPU_TESTS, None, *cpu_tests("config", "sparse_adam_")))
        return [stage]
    stage = [step("reference", "reference", everything, processes=4)]
    if "cuda" in backends:
        stage += [step("CUDA", "cuda", everything, processes=4)]
    if "triton" in backends:  # compiles for long at first
        stage += [step("Triton", "triton", everything, triton, processes=6)]
    stage += [step(CPU_TESTS, None, *cpu_tests(), processes=8)]
    return [stage]


def cpu_tests(*only: str) -> list[str]:
    """The other test files, less those that need what the machine lacks."""
    packages = ("hypothesis", "tensorly")
    lacking = [name for name in packages if gpu_report.version(name) == "absent"]
    kept = []
    for file in sorted((ROOT / "python_tests").glob("test_*.py")):
        name, text = file.stem.removeprefix("test_"), file.read_text()
        if name in NOT_ON_CPU or (only and name not in only):
            continue
        if any(f"import {p}" in text or f"from {p}" in text for p in lacking):
            print(f"   {file.name} is left out: {', '.join(lacking)} absent", flush=True)
            continue
        kept.append(str(file))
    return kept


def sanitizer(device: str, backends: Sequence[str]) -> list[Stage]:
    """Small tests only. In memcheck each tensor is an allocation of its own: its end is exact."""
    if device == "cpu":
        return []
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # On some virtual machines it refuses the device: then it proves nothing, and is not there.
    works = LOGS / "sanitizer-works"
    probe = f"import torch; torch.ones(3).cuda().sum().item(); open({str(works)!r}, 'w')"
    try_it = [tool, f"--error-exitcode={SANITIZER_FAILED}", "--report-api-errors=no"]
    try_it += [sys.executable, "-P", "-c", probe]
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch asks the driver for what it may not have: such API errors are none of ours.
    quiet = ["--report-api-errors=no"]
    stage = []
    for name, flags, dtypes, environment in (
        ("memcheck", quiet, "float32", exact),
        ("memcheck", quiet, "not float32", exact),
        ("racecheck", [], "float32", {}),
        ("racecheck", [], "bfloat16", {}),
    ):
        for backend in backends:
            command = [tool, f"--tool={name}", f"--error-exitcode={SANITIZER_FAILED}", *flags]
            command += ["--target-processes=application-only"]  # not Triton's compiler
            command += [*PYTEST, "python_tests/test_cuda.py", "-k", f"small and {dtypes}"]
            environment = {**environment, "SPARSEGRAD_BACKEND": backend, "OMP_NUM_THREADS": "2"}
            title = f"sanitizer: {name}, {backend}, {dtypes}"
            # It is slow by nature: no time left is no failure.
            stage.append(Step(title, command, 180, environment, [tool, works], ["failed"]))
    return [[Step("sanitizer: does it work here", try_it, 60, needs=[tool])], stage]


def micro(device: str, results: str, backends: Sequence[str], cases: str) -> list[Stage]:
    """One backend after another, alone on the machine."""
    stages = []
    if device == "cuda":
        layer = [sys.executable, str(ROOT / "benchmarks" / "layer_step.py")]
        layer += ["--kernels", f"--json={results}-layer-cuda.json"]
        stages.append([Step("one layer", layer, 120, {"SPARSEGRAD_BACKEND": "cuda"})])
    for backend in ["cpp"] if device == "cpu" else backends:
        command = [*PYTEST, "benchmarks", f"--device={device}"]
        command += [f"--benchmark-json={results}-operators-{backend}.json"]
        if device == "cpu" or cases:
            command += ["-k", cases or "sparse_adam_"]
        environment = {"SPARSEGRAD_BACKEND": backend}
        needs = [ROOT / "benchmarks" / "bench_topk_coo.py"]
        stages.append([Step(f"micro: {backend}", command, 150, environment, needs)])
    return stages


def training(device: str, results: str) -> list[Stage]:
    """Table 3: bfloat16 and TF32, as CUDA graphs, and bfloat16 as Python launches it.

    Where the host decides, and it has other things to do as well, methods take three turns.
    """
    script = ROOT / "benchmarks" / "bench_training.py"
    stages = []
    for name, arguments in (
        ("bfloat16-graph", ["--dtype", "bfloat16", "--graph"]),
        ("tf32-graph", ["--tf32", "--graph"]),
        ("bfloat16", ["--dtype", "bfloat16"]),
    ):
        if device == "cpu" and "--graph" in arguments:
            continue
        command = [sys.executable, str(script), f"--device={device}", *arguments]
        command += [f"--json={results}-training-{name}.json"]
        whole = ["--models=roberta-base", "--tasks=mnli", "--basis-steps=4"]
        whole += ["--turns=1"] if "--graph" in arguments else ["--turns=3", "--steps=12"]
        command += ["--quick"] if device == "cpu" else whole
        stages.append([Step(f"training: {name}", command, 150, needs=[script])])
    return stages


def _without_paths(text: str) -> str:
    """Where things lie on the machine is of no interest to others."""
    text = text.replace(f"{ROOT}/", "").replace(sys.executable, "python")
    return text.replace(f"{sysconfig.get_path('purelib')}/", "")


class Record:
    """What is known so far, written anew after each stage."""

    def __init__(self, device: str, commit: str | None, folder: Path, log: Path) -> None:
        date = time.strftime("%Y%m%d")
        self.machine = gpu_report.machine(device)
        self.machine["commit"] = commit or self.machine["commit"]
        self.results = str(folder / gpu_report.stem(self.machine, date))
        self.log = log
        self.outcomes: list[Outcome] = []
        self.verdict = "unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        for old in self._files():
            old.unlink()

    def write(self) -> None:
        files = self._files()
        document = {
            "kind": "gpu",
            "verdict": self.verdict,
            "machine": self.machine,
            "steps": [asdict(outcome) for outcome in self.outcomes],
            "files": [file.name for file in files],
        }
        Path(f"{self.results}.json").write_text(
            _without_paths(json.dumps(document, indent=1)) + "\n"
        )
        text = gpu_report.markdown(self.machine, self.verdict, self.outcomes, files)
        Path(f"{self.results}.md").write_text(_without_paths(text))
        with self.log.open("w") as out:
            for outcome in self.outcomes:
                out.write(f"==== {outcome.name}: {outcome.command}\n")
                out.write(Path(outcome.log).read_text(errors="replace") if outcome.log else "")

    def _files(self) -> list[Path]:
        path = Path(self.results)
        return sorted(
            file
            for kind in ("operators", "training", "layer")
            for file in path.parent.glob(f"{path.name}-{kind}-*.json")
            if file.stat().st_size
        )


def correctness(device: str, backends: Sequence[str], parts: Sequence[str]) -> list[Stage]:
    """Tests and sanitizers side by side: nothing of them is timed."""
    chosen = [tests(device, backends)] if "tests" in parts else []
    chosen += [sanitizer(device, backends)] if "sanitizer" in parts else []
    before = [stage for part in chosen for stage in part[:-1]]
    return [*before, [step for part in chosen for step in (part[-1] if part else [])]]


def run_all(record: Record, options: argparse.Namespace, parts: Sequence[str]) -> str:
    """The verdict."""
    deadline = time.monotonic() + options.seconds
    for folder in (SITE, LOGS):
        shutil.rmtree(folder, ignore_errors=True)
    LOGS.mkdir(parents=True)
    os.environ["PYTHONPATH"] = str(SITE)
    sys.path.append(str(SITE))  # for the versions of what the wheels bring
    workers = max(1, len(os.sched_getaffinity(0)) // 2)
    device, backends, results = options.device, options.backends, record.results

    plan = {
        "build": lambda: build(device, options.wheels),
        "tests": lambda: correctness(device, backends, parts),
        "training": lambda: training(device, results),
        "micro": lambda: micro(device, results, backends, options.cases),
    }
    for part, stages in plan.items():
        if part != "build" and part not in parts and (part != "tests" or "sanitizer" not in parts):
            continue
        print(f"== {part}", flush=True)
        for stage in stages():
            outcomes = run_stage(stage, LOGS, deadline, workers)
            record.outcomes += outcomes
            record.write()
            for step, outcome in zip(stage, outcomes, strict=True):
                if outcome.status in step.ends_run:
                    print("\n".join(outcome.tail))
                    return f"stopped: {outcome.name} {outcome.status}"
        if part == "build":
            record.machine |= gpu_report.versions()
    bad = [f"{o.name} {o.status}" for o in record.outcomes if not o.good]
    return f"incomplete: {'; '.join(bad)}" if bad else "all passed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="installed beside the package")
    parser.add_argument("--out", type=Path, metavar="DIR", help="by default benchmarks/results")
    backends = ["cuda", "triton"]
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends)
    parser.add_argument("--cases", default="", help="pytest -k for the microbenchmarks")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="that it may take in all")
    parser.add_argument("--commit", help="of a copy of the tree without its repository")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.py: no GPU is here; --device cpu makes a dry run")
    dry = options.device == "cpu"
    default = ROOT / "build" / "gpu-results" if dry else ROOT / "benchmarks" / "results"
    log = (options.out or ROOT / "build").resolve() / "gpu.log"
    folder = (options.out or default).resolve()
    record = Record(options.device, options.commit, folder, log)
    parts = [part for part in PARTS if not options.only or part in options.only]
    record.verdict = run_all(record, options, parts)
    record.write()
    print(f"\n{record.verdict}\n{record.results}.md")
    raise SystemExit(record.verdict != "all passed")


if __name__ == "__main__":
    main()
