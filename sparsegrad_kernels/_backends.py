"""Loads the compiled kernels, and says what loaded and what did not, and why."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from .ops._library import SYNC_FREE_DEVICES

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Args:
        name: "reference", "cpp", "cuda" or "triton".
        loaded: whether its kernels are registered.
        reason: how it was loaded, or why it was not.
        details: what more there is to know: how it was built, for which devices.
    """

    name: str
    loaded: bool
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


class _Unavailable(Exception):
    """Why a backend cannot be loaded."""


def backends() -> dict[str, Backend]:
    """What computes the operators in this process: "reference", "cpp", "cuda" and "triton".

    The reference serves every device; C++ kernels replace it on the CPU, CUDA and Triton kernels
    on CUDA devices. The environment variable `SPARSEGRAD_BACKEND`, read when the package is
    imported, forces one of the four: the others' kernels are then not loaded, and one that is not
    there is an `ImportError`.
    """
    return dict(_BACKENDS)


def _load_cpp() -> tuple[str, dict[str, Any]]:
    _find("cpp", "_C")
    module = importlib.import_module(f"{__package__}._C")
    return f"from {module.__file__}", module.build_info()


def _load_cuda() -> tuple[str, dict[str, Any]]:
    if torch.version.cuda is None:
        raise _Unavailable(f"torch {torch.__version__} is built without CUDA")
    path = _find("cuda", "_C_cuda")
    ctypes.CDLL(path)
    SYNC_FREE_DEVICES.add("cuda")
    return f"from {path}", {}


def _load_triton() -> tuple[str, dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        raise _Unavailable("triton is not installed")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreting and torch.version.cuda is None and torch.version.hip is None:
        raise _Unavailable(
            f"torch {torch.__version__} is built for no GPU; TRITON_INTERPRET is not 1"
        )
    if interpreting and os.environ.get("SPARSEGRAD_BACKEND") != "triton":
        raise _Unavailable("TRITON_INTERPRET=1 without SPARSEGRAD_BACKEND=triton")
    folder = _FOLDER / "_triton"
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    for name in names:
        importlib.import_module(f"{__package__}._triton.{name}")
    SYNC_FREE_DEVICES.add("cpu" if interpreting else "cuda")
    where = "the interpreter, for CPU tensors" if interpreting else "compiled at first use"
    return f"{len(names)} modules, {where}", {"modules": names}


def _find(backend: str, library: str) -> str:
    """The path of a compiled library; where there is none, what the build recorded about it."""
    # In this folder: the import system might find that of another, editable, installation.
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"{library}{suffix}"
        if path.exists():
            return str(path)
    for other in _FOLDER.glob(f"{library}.*.so"):
        raise _Unavailable(f"built for another Python: {other.name}")
    record = _FOLDER / "_build.json"
    if not record.exists():
        raise _Unavailable("not built: this is a source tree; install it with pip")
    why_not = json.loads(record.read_text()).get(backend)
    raise _Unavailable(f"not built: {why_not}" if why_not else f"built, but not in {_FOLDER}")


_LOADERS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "reference": lambda: ("always there: PyTorch, for what no kernel serves", {}),
    "cpp": _load_cpp,
    "cuda": _load_cuda,
    "triton": _load_triton,
}


def _load_all(forced: str) -> dict[str, Backend]:
    if forced and forced not in _LOADERS:
        raise ImportError(f"SPARSEGRAD_BACKEND={forced} is none of {', '.join(_LOADERS)}")
    found = {}
    for name, load in _LOADERS.items():
        if forced and name not in ("reference", forced):
            found[name] = Backend(name, False, f"SPARSEGRAD_BACKEND={forced}")
            continue
        try:
            found[name] = Backend(name, True, *load())
        except (
            Exception
        ) as error:  # a backend that breaks is said, and does not take the others along
            if forced:
                raise ImportError(f"SPARSEGRAD_BACKEND={forced}: {error}") from error
            if not isinstance(error, _Unavailable):
                warnings.warn(f"the {name} kernels did not load: {error}", RuntimeWarning, 2)
            found[name] = Backend(name, False, str(error))
    return found


_BACKENDS = _load_all(os.environ.get("SPARSEGRAD_BACKEND", ""))
