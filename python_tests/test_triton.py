"""The Triton backend without a GPU: what loads, is compiled, and that nothing is waited for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import sparsegrad_kernels

PACKAGE = Path(sparsegrad_kernels.__file__).parent
OPS = sorted(sparsegrad_kernels.ops.__all__)
READ_ONCE = ("nonzero_rows_cols", "sparse_dense_mm_coo")  # their outputs' shapes depend on the data

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(command: list[str], interpret: bool, backend: str = "") -> subprocess.CompletedProcess:
    paths = (PACKAGE.parent, PACKAGE.parent / "benchmarks")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "SPARSEGRAD_BACKEND": backend,
        "TRITON_INTERPRET": "1" if interpret else "0",
    }
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def test_without_interpreter_a_torch_for_cpus_cannot_be_forced():
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs")
    result = run(["-c", "import sparsegrad_kernels"], False, "triton")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        f"ImportError: SPARSEGRAD_BACKEND=triton: torch {torch.__version__} is built for no GPU; "
        "TRITON_INTERPRET is not 1"
    )


def test_interpreter_serves_every_operator_on_the_cpu():
    code = (
        "import torch, sparsegrad_kernels\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"print([op for op in {OPS} if has(f'sparsegrad_kernels::{{op}}', 'CPU')])"
    )
    result = run(["-c", code], True, "triton")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(OPS)


@cache
def _launches(interpret: bool) -> subprocess.CompletedProcess:
    return run([str(Path(__file__).parent / "launches.py")], interpret, "reference")


def launches(interpret: bool) -> dict:
    """What `launches.py` prints."""
    result = _launches(interpret)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


modes = pytest.mark.parametrize("interpret", [False, True], ids=["fake", "interpreter"])


@modes
def test_what_waits_for_a_value_is_noticed(interpret):
    controls = launches(interpret)["controls"]
    for name in ("item", "tolist", "mask", "nonzero"):
        assert controls[name]["reads"] or controls[name]["error"], name
    operations = ["sum", "add"]
    assert controls["none"] == {"reads": [], "operations": operations, "error": "", "launched": []}


def owner(case: str) -> str:
    """The public operator that a launcher belongs to."""
    name = case.split()[0].lstrip("_")
    return max((op for op in OPS if name.startswith(op)), key=len, default=name)


def test_every_launcher_belongs_to_an_operator():
    assert {owner(case) for case in launches(False)["found"]} == set(OPS)


@modes
@pytest.mark.parametrize("op", OPS)
def test_no_launcher_reads_a_value_of_the_device(op, interpret):
    # Also launchers of private operators, as `_<op>_near`.
    found = launches(interpret)["found"]
    cases = {c: seen for c, seen in found.items() if owner(c) == op}
    assert cases
    for case, seen in cases.items():
        assert not seen["error"], f"{case}: {seen['error']}"
        if op not in READ_ONCE:
            assert not seen["reads"], f"{case}: {seen['reads']}"
        elif "empty" not in case:
            assert len(seen["reads"]) == 1, f"{case}: {seen['reads']}"
        if "empty" not in case:
            assert seen["launched"], f"{case} launches nothing"


@modes
def test_fold_is_one_launch(interpret):
    cases = {c: seen for c, seen in launches(interpret)["found"].items() if owner(c) == "fold_"}
    assert cases
    for case, seen in cases.items():
        assert len(seen["launched"]) == 1, f"{case}: {seen['launched']}"
        # Those that its tasks count in.
        assert seen["operations"] == ["zeros"], f"{case}: {seen['operations']}"


@pytest.mark.parametrize("op", OPS)
def test_what_is_launched_is_compiled_ahead_of_time(op):
    seen = launches(False)
    compiled = [entry for entries in seen["compiled"].values() for entry in entries]
    for case, result in seen["found"].items():
        for kernel, pointers in result["launched"] if owner(case) == op else []:
            types = [signature for name, signature in compiled if name == kernel]
            assert types, f"{case} launches {kernel}, which no AOT list has"
            # Others of its arguments may be wider: parts of sums, offsets beyond 2^31.
            first = next((name for name, kind in pointers.items() if "f" in kind), "")
            assert pointers.get(first) in {signature.get(first) for signature in types}, (
                f"{case} launches {kernel} for {pointers.get(first)}, which no AOT list has"
            )


def test_ahead_of_time_lists_have_every_kernel():
    seen = launches(False)
    assert sorted(seen["compiled"]) == OPS
    compiled = {name for entries in seen["compiled"].values() for name, _ in entries}
    assert set(seen["kernels"]) == compiled


@pytest.mark.parametrize("op", OPS)
def test_one_configuration_compiles(op):
    code = (
        "import compile_triton as tool\n"
        # None where an operator launches the kernels of another.
        f"for entry in tool.entries({op!r})[:1]:\n"
        "    found = tool.measure(entry, tool.TARGETS['cuda:90'], 'aligned')\n"
        "    assert not found['problems'], found\n"
        "    assert 0 < found['registers'] <= 255 and 0 < found['occupancy'] <= 1, found"
    )
    result = run(["-c", code], False, "reference")
    assert result.returncode == 0, result.stderr
