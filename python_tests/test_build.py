"""The build: what setup.py decides, and (slow) that pip installs it in every kind of environment.

The slow tests install torch 2.13.0 and 2.14.1 where pip finds them: gigabytes, and minutes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from sparsegrad_kernels import _backends, backends

ROOT = Path(__file__).resolve().parent.parent
TORCH_VERSIONS = ("2.13.0", "2.14.1")
OPS = [p.stem for p in sorted(ROOT.glob("sparsegrad_kernels/ops/[a-z]*.py"))]
OP_TESTS = [f"test_{op}.py" for op in OPS if (ROOT / f"python_tests/test_{op}.py").exists()]
SYSTEM_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
BUILT = (
    "*.so",
    "_build.json",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*",
    "sparsegrad-out",
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the source tree with nothing built in it."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*BUILT)))


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """The only folder on PATH; every variable that the build reads is unset."""
    for name in ("SPARSEGRAD_BUILD", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)


def load(path: Path, monkeypatch) -> ModuleType:
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "toolchain", raising=False)
    spec = importlib.util.spec_from_file_location(path.stem + "_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- What setup.py decides ----


def plan(source, monkeypatch) -> tuple[list[str], dict[str, str]]:
    setup = load(source / "setup.py", monkeypatch)
    return [e.name.rpartition(".")[2] for e in setup.EXTENSIONS], setup.WHY_NOT


def refusal(source, monkeypatch) -> str:
    with pytest.raises(SystemExit) as error:
        plan(source, monkeypatch)
    return str(error.value)


@pytest.fixture
def cuda_source(source) -> Path:
    (source / "csrc/cuda").mkdir(exist_ok=True)
    (source / "csrc/cuda/some_op.cu").touch()
    return source


def test_auto_builds_what_it_has_compilers_for(cuda_source, tools, monkeypatch):
    no_cpp = "no C++ compiler: c++, g++ or clang++ not found"
    no_cuda = "no CUDA compiler: nvcc is not on PATH, and CUDA_HOME is not set"
    put(tools, "nvcc")
    assert plan(cuda_source, monkeypatch) == ([], {"cpp": no_cpp, "cuda": no_cpp})
    put(tools, "g++")
    assert plan(cuda_source, monkeypatch) == (["_C", "_C_cuda"], {})
    (tools / "nvcc").unlink()
    assert plan(cuda_source, monkeypatch) == (["_C"], {"cuda": no_cuda})


def test_no_cuda_kernels(source, tools, monkeypatch):
    put(tools, "c++", "nvcc")
    shutil.rmtree(source / "csrc/cuda", ignore_errors=True)
    why = "this version has no CUDA kernels"
    assert plan(source, monkeypatch) == (["_C"], {"cuda": why})
    monkeypatch.setenv("SPARSEGRAD_BUILD", "cuda")
    assert refusal(source, monkeypatch) == f"error: SPARSEGRAD_BUILD=cuda: {why}"


def test_chosen_builds(cuda_source, tools, monkeypatch):
    put(tools, "c++", "nvcc")
    monkeypatch.setenv("SPARSEGRAD_BUILD", "python")
    why = "SPARSEGRAD_BUILD=python"
    assert plan(cuda_source, monkeypatch) == ([], {"cpp": why, "cuda": why})
    monkeypatch.setenv("SPARSEGRAD_BUILD", "cpu")
    assert plan(cuda_source, monkeypatch) == (["_C"], {"cuda": "SPARSEGRAD_BUILD=cpu"})
    monkeypatch.setenv("SPARSEGRAD_BUILD", "cuda")
    assert plan(cuda_source, monkeypatch) == (["_C", "_C_cuda"], {})


def test_chosen_build_that_cannot_be_made_is_refused(cuda_source, tools, monkeypatch):
    for mode in ("cpu", "cuda"):
        monkeypatch.setenv("SPARSEGRAD_BUILD", mode)
        assert "no C++ compiler" in refusal(cuda_source, monkeypatch)
    put(tools, "c++")
    assert "SPARSEGRAD_BUILD=cuda: no CUDA compiler" in refusal(cuda_source, monkeypatch)
    monkeypatch.setenv("SPARSEGRAD_BUILD", "fast")
    message = refusal(cuda_source, monkeypatch)
    assert message == "error: SPARSEGRAD_BUILD=fast is none of auto, cpu, cuda, python"


# ---- What it builds with ----


@pytest.fixture
def toolchain(tools, monkeypatch) -> ModuleType:
    return load(ROOT / "csrc/toolchain.py", monkeypatch)


def test_compilers_that_variables_name(toolchain, tools, tmp_path, monkeypatch):
    put(tools, "c++", "nvcc", "ccache")
    monkeypatch.setenv("CXX", "ccache my-g++ -m64")
    assert toolchain.find_cxx()[0] == ["ccache", "my-g++", "-m64"]
    assert toolchain.find_nvcc()[0] == [str(tools / "nvcc"), "-ccbin=my-g++"]
    monkeypatch.setenv("CXX", "my-g++")
    assert toolchain.find_cxx() == ([], "no C++ compiler: CXX=my-g++ not found")
    assert toolchain.find_nvcc()[0] == [str(tools / "nvcc"), "-ccbin=my-g++"]
    home = tmp_path / "cuda"
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolchain.find_nvcc() == ([], f"no CUDA compiler: nvcc is not in CUDA_HOME={home}")
    (home / "bin").mkdir(parents=True)
    put(home / "bin", "nvcc")
    assert toolchain.find_nvcc()[0][0] == str(home / "bin/nvcc")


def test_cuda_architectures(toolchain, monkeypatch):
    def code(number: str, kind: str) -> str:
        return f"-gencode=arch=compute_{number},code={kind}_{number}"

    default = toolchain.architecture_flags(toolchain.cuda_architectures())
    assert default == [code("80", "sm"), code("80", "compute"), code("90a", "sm")]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;9.0a, 12.0+PTX")
    wanted = [code("75", "sm"), code("86", "sm"), code("90a", "sm"), code("120", "sm")]
    wanted.append(code("120", "compute"))
    assert toolchain.architecture_flags(toolchain.cuda_architectures()) == wanted
    assert toolchain.architecture_flags("native") == ["-arch=native"]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: 'Hopper' is not like"):
        toolchain.architecture_flags("8.0;Hopper")


def test_jobs_are_bounded_by_cores_and_memory(toolchain, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for free, jobs in ((100 << 30, 8), (7 << 30, 3), (1 << 30, 1)):
        monkeypatch.setattr(toolchain, "free_memory", lambda free=free: free)
        assert toolchain.number_of_jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "5")
    assert toolchain.number_of_jobs() == 5
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(SystemExit, match=f"MAX_JOBS={wrong}"):
            toolchain.number_of_jobs()


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu", None])
def test_old_or_missing_torch_is_refused(toolchain, version, monkeypatch):
    if version is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(SystemExit, match=re.escape(f"torch>=2.10; found: {version or 'none'}")):
        toolchain.find_torch()


@pytest.mark.parametrize("ninja", ["", "ninja"])
def test_odd_paths_dependencies_and_failures(toolchain, ninja, tmp_path, monkeypatch):
    found = {tool: shutil.which(tool, path=SYSTEM_PATH) for tool in ("c++", "ninja")}
    if None in found.values():
        pytest.skip(f"not found: {found}")
    monkeypatch.setattr(toolchain, "find_ninja", lambda: found["ninja"] if ninja else None)
    monkeypatch.setenv("PATH", SYSTEM_PATH)
    source, header = tmp_path / "an $odd: name.cpp", tmp_path / "one.h"
    source.write_text('#include "one.h"\nextern "C" const char* one() { return ONE TEXT; }\n')
    header.write_text('#define ONE "1"\n')
    folder = tmp_path / "build $it"
    command = ["c++", "-fPIC", '-DTEXT="$x y"', "-c", str(source), "-o", str(folder / "one.o")]
    compiles = [toolchain.Compile(folder / "one.o", source, command)]
    link = ["c++", "-shared", str(folder / "one.o"), "-o", str(tmp_path / "lib 1/one.so")]
    toolchain.run(compiles, tmp_path / "lib 1/one.so", link, folder)
    assert b"1$x y\0" in (tmp_path / "lib 1/one.so").read_bytes()
    header.write_text('#define ONE "2"\n')
    toolchain.run(compiles, tmp_path / "lib 1/one.so", link, folder)
    assert b"2$x y\0" in (tmp_path / "lib 1/one.so").read_bytes()
    header.write_text("#error no")
    with pytest.raises(subprocess.CalledProcessError):
        toolchain.run(compiles, tmp_path / "lib 1/one.so", link, folder)


def test_a_ninja_that_does_not_run_is_not_used(toolchain, tools):
    assert toolchain.find_ninja() is None
    put(tools, "ninja")
    assert toolchain.find_ninja() is None
    (tools / "ninja").write_text("#!/bin/sh\n")
    assert toolchain.find_ninja() == str(tools / "ninja")


@pytest.mark.skipif(not backends()["cpp"].loaded, reason="the C++ kernels are not loaded")
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_library_imports_only_the_stable_abi():
    library = _backends._find("cpp", "_C")
    command = ["nm", "-D", "--undefined-only", "--demangle", library]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    assert any("torch_library_impl" in symbol for symbol in symbols)
    assert not [s for s in symbols if re.search(r"\b(c10|at|torch|caffe2)::", s)]


# ---- What pip makes of it ----


def pip(python: Path | str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    """pip in a new process, with only `environment` of what the build reads."""
    read = ("CXX", "CUDA_HOME", "CUDA_PATH", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    env = {k: v for k, v in os.environ.items() if k not in read}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "SPARSEGRAD_BUILD": "", **environment}
    command = [str(python), "-m", "pip", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/")


def test_pure_python_wheel(source, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path)
    result = pip(sys.executable, "wheel", *options, source, SPARSEGRAD_BUILD="python")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("sparsegrad_kernels/_build.json"))
        assert not [name for name in archive.namelist() if name.startswith("csrc")]
    assert record == dict.fromkeys(("cpp", "cuda"), "SPARSEGRAD_BUILD=python")


def test_refused_build_says_why(source, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path)
    environment = {"SPARSEGRAD_BUILD": "cpu", "CXX": "no-such-compiler"}
    result = pip(sys.executable, "wheel", *options, source, **environment)
    assert result.returncode == 1
    assert "error: SPARSEGRAD_BUILD=cpu: no C++ compiler: CXX=no-such-compiler not found" in (
        result.stdout + result.stderr
    )
    # A compiler that is there and fails is never an install without kernels.
    result = pip(sys.executable, "wheel", *options, source, CXX="false")
    assert result.returncode == 1
    assert "error: sparsegrad_kernels._C did not compile" in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


# ---- Slow: build isolation, and one wheel under two versions of torch ----

NEEDS = ("numpy", "safetensors", "tqdm", "triton", "pytest", "hypothesis", "pybind11", "ninja")


@pytest.fixture(scope="session")
def environments(tmp_path_factory) -> dict[str, Path]:
    """The Python of an environment with each torch, without this package; "pip": the newest pip."""
    pythons = {}
    for name, needs in [(v, (f"torch=={v}", *NEEDS)) for v in TORCH_VERSIONS] + [("pip", ("pip",))]:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=True)
        pythons[name] = folder / "bin/python"
        result = pip(pythons[name], "install", "--upgrade", *needs)
        assert result.returncode == 0, result.stderr
    return pythons


@pytest.fixture
def isolated(environments, tmp_path):
    """pip, where it builds in isolation, takes the torch that `environments` has on disk."""
    constraint = tmp_path / "constraint.txt"
    constraint.write_text(f"torch=={TORCH_VERSIONS[0]}\n")
    names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    python = environments[TORCH_VERSIONS[0]]

    def install(*args: object, newest_pip: bool = False, **environment: str) -> dict:
        environment |= dict.fromkeys(names, str(constraint))
        options = ("install", "--no-deps", "--force-reinstall", *args)
        if newest_pip:
            result = pip(environments["pip"], "--python", python, *options, **environment)
        else:
            result = pip(python, *options, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return installed(python)

    yield install
    pip(python, "uninstall", "--yes", "sparsegrad_kernels")


def installed(python: Path) -> dict:
    """What the package that this Python imports says of itself."""
    code = """
import json, pathlib, sparsegrad_kernels as s
folder = pathlib.Path(s.__file__).parent
print(json.dumps({
    "folder": str(folder),
    "libraries": sorted(p.name.partition(".")[0] for p in folder.glob("*.so")),
    "record": json.loads((folder / "_build.json").read_text()),
    "loaded": [k for k, v in s.backends().items() if v.loaded],
    "reasons": {k: v.reason for k, v in s.backends().items()},
}))"""
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_compiled(found: dict, nvcc: bool) -> None:
    assert found["loaded"] == ["reference", "cpp"]
    if nvcc and any(ROOT.glob("csrc/cuda/*.cu")):
        assert found["libraries"] == ["_C", "_C_cuda"]
        assert found["record"] == {}
    else:
        assert found["libraries"] == ["_C"]
        assert list(found["record"]) == ["cuda"]


@pytest.mark.slow
@pytest.mark.parametrize("newest_pip", [False, True])
def test_isolated_install(isolated, source, newest_pip):
    check_compiled(isolated(source, newest_pip=newest_pip), nvcc=shutil.which("nvcc") is not None)


@pytest.mark.slow
def test_isolated_install_without_nvcc(isolated, source):
    if shutil.which("nvcc", path=os.defpath):
        pytest.skip("nvcc is beside the C++ compiler")
    check_compiled(isolated(source, PATH=os.defpath), nvcc=False)


@pytest.mark.slow
def test_isolated_install_without_a_visible_gpu(isolated, source):
    found = isolated(source, CUDA_VISIBLE_DEVICES="")
    check_compiled(found, nvcc=shutil.which("nvcc") is not None)


@pytest.mark.slow
def test_isolated_install_without_a_compiler(isolated, source, tmp_path):
    found = isolated(source, PATH=str(tmp_path))
    assert found["libraries"] == []
    assert found["loaded"] == ["reference"]
    assert found["reasons"]["cpp"] == "not built: no C++ compiler: c++, g++ or clang++ not found"


@pytest.mark.slow
def test_errors_are_raised_with_a_runtime_of_its_own(source):
    """With libstdc++ linked in, as by compilers that have it as an archive only."""
    environment = {**os.environ, "SPARSEGRAD_BUILD": "cpu", "LDFLAGS": "-static-libstdc++"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    raising = """
import torch, sparsegrad_kernels
try:
    torch.ops.sparsegrad_kernels.topk_coo(torch.ones(2, 2), 0)
except RuntimeError as error:
    print(sparsegrad_kernels.__file__, error)
"""
    environment = {**os.environ, "SPARSEGRAD_BACKEND": "cpp", "PYTHONPATH": str(source)}
    run = [sys.executable, "-c", raising]
    done = subprocess.run(run, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "k must be at least 1, got 0" in done.stdout
    assert str(source) in done.stdout


@pytest.mark.slow
def test_isolated_install_of_the_sdist(isolated, environments, source, tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    python = environments[TORCH_VERSIONS[0]]
    subprocess.run([python, "-c", code], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    check_compiled(isolated(sdist), nvcc=shutil.which("nvcc") is not None)


@pytest.mark.slow
def test_isolated_editable_install(isolated, source):
    found = isolated("--editable", source)
    check_compiled(found, nvcc=shutil.which("nvcc") is not None)
    assert found["folder"] == str(source / "sparsegrad_kernels")
    # The older build's libraries do not outlive it.
    found = isolated("--editable", source, SPARSEGRAD_BUILD="python")
    assert found["libraries"] == []
    assert found["record"] == dict.fromkeys(("cpp", "cuda"), "SPARSEGRAD_BUILD=python")


@pytest.mark.slow
@pytest.mark.parametrize(("built", "used"), [TORCH_VERSIONS, TORCH_VERSIONS[::-1]])
def test_wheel_of_one_torch_passes_under_another(environments, source, tmp_path, built, used):
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path)
    result = pip(environments[built], "wheel", *options, source, SPARSEGRAD_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = environments[used]
    result = pip(python, "install", "--no-deps", "--force-reinstall", wheel)
    assert result.returncode == 0, result.stderr
    # Beside the tests there is no source tree: they import what was installed.
    tests = shutil.copytree(ROOT / "python_tests", tmp_path / "tests")
    result = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OP_TESTS],
        env={**os.environ, "SPARSEGRAD_BACKEND": "cpp", "PYTHONPATH": ""},
        cwd=tests,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    print(f"built against {built}, under {used}:", result.stdout.splitlines()[-1])
