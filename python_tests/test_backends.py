"""What loads, what is said about what does not, and `SPARSEGRAD_BACKEND`: each in a new process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import sparsegrad_kernels
from sparsegrad_kernels import Backend, backends

PACKAGE = Path(sparsegrad_kernels.__file__).parent
HAS_KERNEL = "torch._C._dispatch_has_kernel_for_dispatch_key('sparsegrad_kernels::topk_coo', 'CPU')"

needs_cpp = pytest.mark.skipif(
    not (PACKAGE / f"_C{EXTENSION_SUFFIXES[0]}").exists(), reason="the C++ kernels are not built"
)


@pytest.fixture
def bare(tmp_path) -> Path:
    """A copy of the package with nothing compiled, in a folder that Python can import from."""
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignored)
    return tmp_path


def run(code: str, folder: Path = PACKAGE.parent, backend: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(folder), "SPARSEGRAD_BACKEND": backend}
    command = [sys.executable, "-c", f"import torch\n{code}"]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def loaded(folder: Path = PACKAGE.parent, backend: str = "", before: str = "") -> dict[str, dict]:
    """What `backends()` says in a new process."""
    result = run(
        f"{before}\nimport dataclasses, json\nfrom sparsegrad_kernels import backends\n"
        "print(json.dumps({k: dataclasses.asdict(v) for k, v in backends().items()}))",
        folder,
        backend,
    )
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout), "stderr": result.stderr}


def import_error(folder: Path = PACKAGE.parent, backend: str = "", before: str = "") -> str:
    result = run(f"{before}\nimport sparsegrad_kernels", folder, backend)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    return last


def test_names_and_reasons():
    found = backends()
    assert list(found) == ["reference", "cpp", "cuda", "triton"]
    assert found["reference"].loaded
    for name, backend in found.items():
        assert backend.name == name
        assert backend.reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        found["cpp"].loaded = True  # type: ignore[misc]
    found["cpp"] = Backend("cpp", False, "changed by the caller")
    assert backends()["cpp"].reason != "changed by the caller"


@needs_cpp
def test_build_info():
    cpp = loaded()["cpp"]
    assert cpp["loaded"]
    info = cpp["details"]
    assert info["version"] == sparsegrad_kernels.__version__
    assert "-O3" in info["flags"]
    assert info["compiler"].partition(" ")[0] in ("gcc", "clang")
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 10)
    assert info["simd_used"] in info["simd_compiled"]
    assert info["simd_compiled"][0] == "baseline"
    assert isinstance(info["cuda_architectures"], str)


@needs_cpp
def test_cpp_kernels_are_registered_and_reference_loads_none():
    code = (
        "import sys, sparsegrad_kernels\n"
        f"print({HAS_KERNEL}, 'sparsegrad_kernels._C' in sys.modules)\n"
        "print(sparsegrad_kernels.ops.topk_coo(torch.tensor([[1.0, -3.0, 2.0]]), 2))"
    )
    cpp, reference = (run(code, backend=name).stdout.splitlines() for name in ("cpp", "reference"))
    assert cpp[0] == "True True"
    assert reference[0] == "False False"
    assert cpp[1:] == reference[1:]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_forced_backend_is_alone(backend):
    found = loaded(backend=backend)
    for name in ("cpp", "cuda", "triton"):
        assert found[name]["loaded"] == (name == backend)
        if name != backend:
            assert found[name]["reason"] == f"SPARSEGRAD_BACKEND={backend}"
    assert found["reference"]["loaded"]


def test_unknown_backend_lists_the_choices():
    assert import_error(backend="fast").endswith(
        "SPARSEGRAD_BACKEND=fast is none of reference, cpp, cuda, triton"
    )


def test_forced_backend_that_is_not_there_names_the_reason(bare):
    for backend in ("cpp", "cuda", "triton"):
        reason = loaded(bare)[backend]["reason"]
        error = import_error(bare, backend)
        assert error == f"ImportError: SPARSEGRAD_BACKEND={backend}: {reason}"


def test_nothing_built(bare):
    found = loaded(bare)
    assert not found["cpp"]["loaded"]
    assert "source tree" in found["cpp"]["reason"]
    assert "Warning: the " not in found["stderr"]
    record = {"cpp": "no C++ compiler: c++, g++ or clang++ not found"}
    (bare / PACKAGE.name / "_build.json").write_text(json.dumps(record))
    assert loaded(bare)["cpp"]["reason"] == f"not built: {record['cpp']}"
    (bare / PACKAGE.name / "_C.cpython-25-other.so").touch()
    assert loaded(bare)["cpp"]["reason"] == "built for another Python: _C.cpython-25-other.so"


@pytest.mark.parametrize(("backend", "library"), [("cpp", "_C"), ("cuda", "_C_cuda")])
def test_broken_library_is_a_warning_or_when_forced_an_error(bare, backend, library):
    path = bare / PACKAGE.name / f"{library}{EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"not a library")
    cuda = "torch.version.cuda = '13.0'"
    found = loaded(bare, before=cuda)
    assert not found[backend]["loaded"]
    assert str(path) in found[backend]["reason"]
    assert f"Warning: the {backend} kernels did not load: {path}" in found["stderr"]
    assert str(path) in import_error(bare, backend, before=cuda)


def test_broken_triton_kernels_do_not_take_the_package_along(bare):
    (bare / PACKAGE.name / "_triton" / "broken.py").write_text("raise AttributeError('too old')")
    cuda = "torch.version.cuda = '13.0'"
    found = loaded(bare, before=cuda)
    assert not found["triton"]["loaded"]
    assert "Warning: the triton kernels did not load: too old" in found["stderr"]
    assert import_error(bare, "triton", before=cuda).endswith("SPARSEGRAD_BACKEND=triton: too old")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_is_not_loaded_under_a_cpu_torch(bare):
    (bare / PACKAGE.name / f"_C_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    reason = f"torch {torch.__version__} is built without CUDA"
    assert loaded(bare)["cuda"]["reason"] == reason


def test_main_prints_what_a_bug_report_needs():
    result = subprocess.run(
        [sys.executable, "-m", "sparsegrad_kernels"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "SPARSEGRAD_BUILD": "auto"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == f"sparsegrad_kernels {sparsegrad_kernels.__version__}"
    names = {line.split(":")[0].strip() for line in lines if ":" in line}
    assert {"torch", "CUDA", "triton", "Python", "OS", "CPU", "SIMD", "SPARSEGRAD_BUILD"} <= names
    assert torch.__version__ in result.stdout
    for backend in backends().values():
        state = "loaded" if backend.loaded else "not loaded"
        assert f"  {backend.name + ':':<12}{state}: {backend.reason}" in lines
