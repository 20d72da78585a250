"""Runs every Triton launcher and prints, as JSON, what it launched and how often it read a value.

A program of its own, for `test_triton.py`. On fake CUDA tensors the kernel launches are left out
and no GPU is needed; with TRITON_INTERPRET=1 the kernels run, on small CPU tensors. With
SPARSEGRAD_BACKEND=reference, so that the launchers are imported, and caught, here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.interpreter import InterpretedFunction

from sparsegrad_kernels._triton import __path__ as FOLDERS
from sparsegrad_kernels._triton import _common
from sparsegrad_kernels.ops import _checks

INTERPRETING = knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETING else "cuda:0"
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [tokens, out_features, in_features]
SHAPES = {"odd": (37, 21, 19), "empty": (0, 5, 4)}
if not INTERPRETING:  # fake tensors take no memory
    SHAPES["wide"] = (40, 9000, 50)  # long sums for a small result
    SHAPES["tall"] = (9000, 40, 50)
    SHAPES["large"] = (2**18, 2**17, 2**15)  # offsets beyond 2^31


def load() -> tuple[dict[str, Callable[..., Any]], dict[str, list]]:
    """The launchers, caught as they register, and what each module has compiled ahead of time."""
    launchers: dict[str, Callable[..., Any]] = {}
    _common.implement = lambda name: lambda launcher: launchers.setdefault(name, launcher)
    _common._multiprocessors = lambda index: 132
    _checks.check_bounds = lambda indices, shape: None  # it reads, on the CPU only
    ahead_of_time = {}
    for path in sorted(Path(FOLDERS[0]).glob("[!_]*.py")):
        module = importlib.import_module(f"sparsegrad_kernels._triton.{path.stem}")
        ahead_of_time[path.stem] = getattr(module, "AOT", [])
    return launchers, ahead_of_time


def kernels() -> list[str]:
    """The package's functions for Triton that no other one calls."""
    functions = {}
    for path in Path(FOLDERS[0]).glob("*.py"):
        module = importlib.import_module(f"sparsegrad_kernels._triton.{path.stem}")
        for value in map(unwrap, vars(module).values()):
            if isinstance(value, triton.runtime.KernelInterface):
                functions[value.fn.__name__] = inspect.getsource(value.fn).partition("):")[2]
    bodies = "".join(functions.values())
    return [name for name in functions if not re.search(rf"\b{name}\(", bodies)]


def unwrap(kernel: Any) -> Any:
    """The kernel within its autotuner."""
    while isinstance(kernel, (Autotuner, Heuristics)):
        kernel = kernel.fn
    return kernel


class Launches:
    """What the kernels were launched with; calls are checked against the kernels' arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.running = False

    def leave_out(self) -> None:
        """Record instead of launching."""
        for kind in (triton.JITFunction, Autotuner, Heuristics):
            kind.run = lambda kernel, *args, **kwargs: self.record(kernel, args, kwargs)

    def watch_interpreter(self) -> None:
        """Know when a kernel, and not its launcher, is running."""
        run = InterpretedFunction.run

        def watched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.running = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self.running = False
                self.seen.append((kernel.fn.__name__, {}))

        InterpretedFunction.run = watched

    def record(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tuned = [each for each in [kernel] if isinstance(each, Autotuner)]
        inner = unwrap(kernel)
        named = {**dict(zip(inner.arg_names, args, strict=False)), **kwargs}
        grid = named.pop("grid")
        configurations = [c.all_kwargs() for each in tuned for c in each.configs] or [{}]
        for chosen in configurations:
            meta = {**named, **chosen}
            missing = set(inner.arg_names) - set(meta)
            assert not missing, f"{inner.__name__} is launched without {sorted(missing)}"
            sizes = grid(meta) if callable(grid) else grid
            sizes = sizes if isinstance(sizes, tuple) else (sizes,)
            assert all(type(n) is int and 0 < n < 2**31 for n in sizes), f"the grid is {sizes}"
            assert all(n < 2**16 for n in sizes[1:]), f"the grid is {sizes}"
        pointers = {n: f"*{TYPES[t.dtype]}" for n, t in named.items() if isinstance(t, Tensor)}
        self.seen.append((inner.__name__, pointers))


class Operations(TorchDispatchMode):
    """Outside kernels: which operations are more than views and allocations, and which wait for a
    value of the device."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches
        self.reads: list[str] = []
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.launches.running:
            return func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        makes = any("Tensor" in str(each.type) for each in func._schema.returns)
        if makes and not func.is_view and name not in ("empty", "new_empty"):
            self.found.append(name)
        masks = name == "index" and [i for i in args[1] if i is not None and i.dtype == torch.bool]
        if masks or name in ("nonzero", "masked_select", "_unique2", "equal"):
            self.reads.append(name)
        if name == "_local_scalar_dense":
            return self.read(args[0], name) or func(*args)
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, out) if isinstance(t, Tensor)}
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self.reads.append(f"{name} between host and device")
        return out

    def read(self, tensor: Tensor, name: str) -> int:
        """A count for what is fake; a copy on the host was counted when it was made."""
        if tensor.device == torch.device(DEVICE):
            self.reads.append(name)
        return 0 if INTERPRETING else 5

    @contextmanager
    def with_tolist(self) -> Iterator[None]:
        """`tolist` is no operation that could be dispatched."""
        tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            if self.launches.running:
                return tolist(tensor)
            value = self.read(tensor, "tolist")
            return [value] * tensor.numel() if value else tolist(tensor)

        Tensor.tolist = FakeTensor.tolist = counted
        try:
            with self:
                yield
        finally:
            Tensor.tolist = FakeTensor.tolist = tolist


def index(tensor: Tensor, at: Any) -> Tensor:
    """`tensor[at]` for fake CUDA tensors under a torch without CUDA, whose own needs the device."""
    parts = at if isinstance(at, tuple) else (at,)
    if any(isinstance(part, Tensor) for part in parts):
        return torch.ops.aten.index(tensor, list(parts))
    dim = 0
    for part in parts:
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        else:
            raise NotImplementedError(f"an index of type {type(part).__name__}")
        dim += 1
    return tensor


def arguments(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """For the operator's schema, by the names that this package uses."""
    tokens, n_out, n_in = shape
    k = 7

    def tensor(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.ones(size, dtype=dtype, device=DEVICE)

    def matrix(rows: int, cols: int) -> Tensor:
        """Neither contiguous nor transposed."""
        return tensor(rows, cols + 1)[:, :cols]

    entries = torch.arange(k, device=DEVICE) % max(min(n_out, n_in), 1)
    known: dict[str, Callable[[], Any]] = {
        "a": lambda: matrix(tokens, n_out),
        "b": lambda: matrix(n_out, n_in),
        "g": lambda: matrix(tokens, n_out),
        "x": lambda: matrix(tokens, n_in),
        "c": lambda: matrix(n_out, n_in),
        "u": lambda: matrix(n_in, n_in),
        "v": lambda: matrix(n_out, n_out),
        **dict.fromkeys(("param", "exp_avg", "exp_avg_sq", "weight"), lambda: matrix(n_out, n_in)),
        "indices": lambda: torch.stack([entries, entries]),
        "values": lambda: tensor(k),
        "threshold": lambda: tensor(1, dtype=torch.float32),
        "seed": lambda: tensor(1, dtype=torch.int64),
        "step": lambda: 1,
        "k": lambda: k,
        "tol": lambda: 0.0,
        "lr": lambda: 1e-3,
        "beta1": lambda: 0.9,
        "beta2": lambda: 0.999,
        "eps": lambda: 1e-8,
    }
    schema = getattr(torch.ops.sparsegrad_kernels, name).default._schema
    chosen = {}
    for argument in schema.arguments:
        if argument.name in ("step", "lr") and "Tensor" in str(argument.type):
            chosen[argument.name] = tensor(dtype=torch.float32)
        elif argument.name in known:
            chosen[argument.name] = known[argument.name]()
        elif not argument.has_default_value():
            assert "Optional" in str(argument.type), f"{name} has an unknown {argument.name}"
            chosen[argument.name] = None
    return chosen


def observe(launcher: Callable[[], Any], launches: Launches) -> dict[str, Any]:
    operations = Operations(launches)
    launches.seen = []
    error = ""
    try:
        with operations.with_tolist():
            launcher()
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {
        "reads": operations.reads,
        "operations": operations.found,
        "error": error,
        "launched": launches.seen,
    }


def main() -> None:
    launchers, ahead_of_time = load()
    launches = Launches()
    if INTERPRETING:
        launches.watch_interpreter()
    else:
        launches.leave_out()
        if not torch.cuda.is_available():
            Tensor.__getitem__ = index
            Tensor.__int__ = Tensor.__index__ = Tensor.item
    found: dict[str, Any] = {}
    with nullcontext() if INTERPRETING else FakeTensorMode(allow_non_fake_inputs=True):
        for name, launcher in launchers.items():
            for what, shape in SHAPES.items():
                for dtype in DTYPES:
                    args = arguments(name, shape, dtype)
                    for absent in ("", "u", "v", "uv") if "u" in args else ("",):
                        case = f"{name} {what} {TYPES[dtype]}" + f" without {absent}" * bool(absent)
                        given = {**args, **dict.fromkeys(absent)}
                        call = partial(launcher, *given.values())
                        found[case] = observe(call, launches)
        one = torch.ones(3, device=DEVICE)
        controls = {
            "item": lambda: one.sum().item(),
            "tolist": lambda: one.tolist(),
            "mask": lambda: one[one > 0],
            "nonzero": lambda: one.nonzero(),
            "none": lambda: one.sum() + one.new_empty(3),
        }
        controlled = {name: observe(call, launches) for name, call in controls.items()}
    compiled = {
        name: [(unwrap(kernel).__name__, signature) for kernel, signature, _, _ in entries]
        for name, entries in ahead_of_time.items()
    }
    print(
        json.dumps(
            {
                "found": found,
                "controls": controlled,
                "compiled": compiled,
                "kernels": kernels(),
            }
        )
    )


if __name__ == "__main__":
    main()
