"""`python -m sparsegrad_kernels`: what a bug report needs to say about versions and kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from . import __version__, backends


def main() -> None:
    print(f"sparsegrad_kernels {__version__}")
    for name, value in environment().items():
        print(f"  {name + ':':<12}{value}")
    print("backends")
    for backend in backends().values():
        loaded = "loaded" if backend.loaded else "not loaded"
        print(f"  {backend.name + ':':<12}{loaded}: {backend.reason}")
        for name, value in backend.details.items():
            print(f"    {name}: {', '.join(value) if isinstance(value, tuple) else value or '-'}")


def environment() -> dict[str, str]:
    return {
        "torch": f"{torch.__version__} ({torch.get_num_threads()} threads)",
        "CUDA": cuda(),
        "triton": version_of("triton"),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "OS": platform.platform(),
        "CPU": f"{cpu_model()}, {os.cpu_count()} logical cores",
        "SIMD": torch.backends.cpu.get_cpu_capability(),
        **{k: v for k, v in sorted(os.environ.items()) if k.startswith("SPARSEGRAD_")},
    }


def cuda() -> str:
    built = torch.version.cuda
    if built is None:
        return "torch is built without it"
    if not torch.cuda.is_available():
        return f"{built}, no GPU available"
    devices = range(torch.cuda.device_count())
    return f"{built}, " + ", ".join(torch.cuda.get_device_name(device) for device in devices)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
