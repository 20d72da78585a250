"""What setup.py builds with: compilers, their flags, torch's headers, and ninja.

torch.utils.cpp_extension is not used: it links to torch's unstable ABI, insists that nvcc's CUDA
is that of the torch at build time, and builds no CUDA code beside a CPU-only torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Machine code for Ampere, Ada (which runs sm_80 code) and Hopper; PTX for all that came later.
DEFAULT_CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
BYTES_PER_JOB = 2 << 30


class Compile(NamedTuple):
    """One object file: `command` followed by the flags that write its dependencies."""

    target: Path
    source: Path
    command: list[str]


def find_cxx() -> tuple[list[str], str]:
    """The C++ compiler's command, or none and the reason."""
    if sys.platform != "linux":
        return [], "the C++ kernels are built on Linux only"
    wanted = os.environ.get("CXX", "").strip()
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command, ""
    return [], f"no C++ compiler: {f'CXX={wanted}' if wanted else 'c++, g++ or clang++'} not found"


def find_nvcc() -> tuple[list[str], str]:
    """nvcc's command, or none and the reason. nvcc uses the host compiler that CXX names."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH, and CUDA_HOME is not set"
        return [], f"no CUDA compiler: nvcc is not {where}"
    # Of "ccache g++ -m64" it is g++.
    host = [word for word in shlex.split(os.environ.get("CXX", "")) if not word.startswith("-")]
    return [nvcc, *(f"-ccbin={word}" for word in host[-1:])], ""


def cuda_architectures() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a+PTX", or "native"."""
    if architectures == "native":
        return ["-arch=native"]
    flags = []
    for entry in re.split(r"[;,\s]+", architectures.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"error: TORCH_CUDA_ARCH_LIST: {entry!r} is not like 8.0, 9.0a or 9.0+PTX"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_torch() -> tuple[Path, str]:
    """The folder and version of the torch to build against. It is not imported: that is slow."""
    spec = importlib.util.find_spec("torch")
    version = importlib.metadata.version("torch") if spec else "none"
    if spec is None or tuple(map(int, version.split(".")[:2])) < (2, 10):
        raise SystemExit(f"error: the kernels are built against torch>=2.10; found: {version}")
    return Path(str(spec.origin)).parent, version


def include_flags(torch: Path) -> list[str]:
    # torch's folder carries a copy of pybind11: what the build asked for comes before it.
    folders = [str(torch / "include"), sysconfig.get_paths()["include"]]
    if importlib.util.find_spec("pybind11"):
        import pybind11

        folders.insert(0, pybind11.get_include())
    return [flag for folder in folders for flag in ("-isystem", folder)]


def number_of_jobs() -> int:
    """MAX_JOBS, or as many as there are cores and memory for."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise SystemExit(f"error: MAX_JOBS={wanted} is not a positive number")
        return int(wanted)
    return max(1, min(len(os.sched_getaffinity(0)), free_memory() // BYTES_PER_JOB))


def free_memory() -> int:
    """Bytes: what the machine has free, or the container's limit where that is less."""
    meminfo = Path("/proc/meminfo").read_text()
    free = int(re.search(r"MemAvailable:\s*(\d+) kB", meminfo)[1]) << 10  # type: ignore[index]
    limit = Path("/sys/fs/cgroup/memory.max")
    wanted = limit.read_text().strip() if limit.exists() else "max"
    return min(free, int(wanted)) if wanted.isdigit() else free


def run(compiles: list[Compile], target: Path, link: list[str], folder: Path) -> None:
    """Compile in parallel, then link. Raises subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    ninja, jobs = find_ninja(), number_of_jobs()
    if ninja:
        (folder / "build.ninja").write_text(ninja_file(compiles, target, link))
        subprocess.run([ninja, "-j", str(jobs)], cwd=folder, check=True)
        return
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda one: subprocess.run(one.command, check=True), compiles))
    subprocess.run(link, check=True)


def find_ninja() -> str | None:
    ninja = shutil.which("ninja")
    # What is found may be a pyenv shim for a ninja that another Python has.
    works = ninja and subprocess.run([ninja, "--version"], capture_output=True).returncode == 0
    return ninja if works else None


def ninja_file(compiles: list[Compile], target: Path, link: list[str]) -> str:
    def path(value: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def shell(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    lines = ["rule compile", "  command = $shell -MD -MF $out.d", "  depfile = $out.d"]
    lines += ["  deps = gcc", "rule link", "  command = $shell"]
    for one in compiles:
        lines.append(f"build {path(one.target)}: compile {path(one.source)}")
        lines.append(f"  shell = {shell(one.command)}")
    lines.append(f"build {path(target)}: link {' '.join(path(one.target) for one in compiles)}")
    lines.append(f"  shell = {shell(link)}")
    return "\n".join(lines) + "\n"
