"""Builds the compiled kernels; the metadata is in pyproject.toml.

SPARSEGRAD_BUILD  auto (default): `_C` where a C++ compiler is, and `_C_cuda` where nvcc is too;
                  cpu: `_C`; cuda: both; python: neither. What is asked for by name and cannot be
                  built is an error. So is, in every mode, a compiler that is there and fails.
Also read         CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS.

The kernels use PyTorch's stable ABI: built against one torch >= 2.10, they run with any.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

PACKAGE = "sparsegrad_kernels"
CPU, CUDA = f"{PACKAGE}._C", f"{PACKAGE}._C_cuda"
MODES = ("auto", "cpu", "cuda", "python")
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
CXX_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # as torch: or sqrt is no vector operation
NVCC_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
# A compiler may bring its C++ runtime as an archive only. Exported, half of it would take the place
# of the runtime that torch loaded, and what throws or formats a number would crash.
HIDE_ARCHIVES = "--exclude-libs=ALL"


def sources(*patterns: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def make_plan() -> tuple[list[Extension], dict[str, str]]:
    """What is built, and for what is not, why."""
    mode = os.environ.get("SPARSEGRAD_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"error: SPARSEGRAD_BUILD={mode} is none of {', '.join(MODES)}")
    cpu = Extension(CPU, sources("csrc/module.cpp", "csrc/cpu/*.cpp"))
    cuda = Extension(CUDA, sources("csrc/cuda/*.cu"))
    no_cpp = toolchain.find_cxx()[1]
    no_cuda = no_cpp or toolchain.find_nvcc()[1]
    if not cuda.sources:
        no_cuda = "this version has no CUDA kernels"
    if mode == "python":
        no_cpp = no_cuda = "SPARSEGRAD_BUILD=python"
    elif mode == "cpu":
        no_cuda = "SPARSEGRAD_BUILD=cpu"
    why_not = {name: why for name, why in (("cpp", no_cpp), ("cuda", no_cuda)) if why}
    forced = {"cpu": ["cpp"], "cuda": ["cpp", "cuda"]}.get(mode, [])
    for name in forced:
        if name in why_not:
            raise SystemExit(f"error: SPARSEGRAD_BUILD={mode}: {why_not[name]}")
    return [e for e, why in ((cpu, no_cpp), (cuda, no_cuda)) if not why], why_not


EXTENSIONS, WHY_NOT = make_plan()


class BuildPython(build_py):
    """Records, for `backends()`, why a library was not built; an older build's are removed."""

    def run(self) -> None:
        super().run()
        folder = Path(ROOT if self.editable_mode else self.build_lib, PACKAGE)
        for stale in folder.glob("_C*.so"):
            stale.unlink()
        (folder / "_build.json").write_text(json.dumps(WHY_NOT, indent=2) + "\n")
        for name, why in WHY_NOT.items():
            print(f"{PACKAGE}: the {name} kernels are not built: {why}", file=sys.stderr)


class BuildKernels(build_ext):
    """Each extension by ninja: `_C` with the C++ compiler, `_C_cuda` with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        torch, torch_version = toolchain.find_torch()
        cuda = ext.name == CUDA
        compiler, flags, libraries = self.nvcc() if cuda else self.cxx(torch_version)
        flags = [*compiler, ABI, *flags, *toolchain.include_flags(torch)]
        folder = Path(self.build_temp, ext.name).absolute()
        compiles = []
        for source in ext.sources:
            target = folder / f"{Path(source).stem}.o"
            command = [*flags, "-c", str(ROOT / source), "-o", str(target)]
            compiles.append(toolchain.Compile(target, ROOT / source, command))
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        link = [*compiler, "-shared", *(str(one.target) for one in compiles), "-o", str(library)]
        link += [f"-L{torch / 'lib'}", *libraries]
        try:
            toolchain.run(compiles, library, link, folder)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                f"{ext.name} did not compile (see above); SPARSEGRAD_BUILD=python goes without"
            ) from error

    def cxx(self, torch_version: str) -> tuple[list[str], list[str], list[str]]:
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        build_info = {
            "FLAGS": shlex.join(flags),
            "VERSION": self.distribution.get_version(),
            "TORCH": torch_version,
            "CUDA_ARCHITECTURES": "" if "cuda" in WHY_NOT else toolchain.cuda_architectures(),
        }
        flags += [f"-DSPARSEGRAD_{name}={json.dumps(value)}" for name, value in build_info.items()]
        libraries = ["-ltorch_cpu", f"-Wl,{HIDE_ARCHIVES}"]
        libraries += shlex.split(os.environ.get("LDFLAGS", ""))
        return toolchain.find_cxx()[0], flags, libraries

    def nvcc(self) -> tuple[list[str], list[str], list[str]]:
        architectures = toolchain.architecture_flags(toolchain.cuda_architectures())
        # Under a CUDA torch libtorch needs libtorch_cuda, and so lends it to this library, which
        # therefore also links, and later loads, where it was built beside a CPU-only torch.
        libraries = ["-cudart=shared", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
        libraries.append(f"-Xlinker={HIDE_ARCHIVES}")
        libraries += architectures
        return toolchain.find_nvcc()[0], [*NVCC_FLAGS, *architectures], libraries


if __name__ == "__main__":
    setup(
        ext_modules=EXTENSIONS,
        cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    )
