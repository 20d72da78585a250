"""The preliminary phase (paper section 3.1): gradients of a few batches, and their HOSVD.

HOSVD's factor for a mode holds the left singular vectors of the tensor's unfolding along it. For
gradients `G_i [out, in]` stacked over steps and blocks these are the eigenvectors of
`sum G_i^T G_i` (mode `in`) and `sum G_i G_i^T` (mode `out`), which can be summed as they come.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._files import save_safetensors
from .config import SparseGradConfig, Target, find_targets, linear_view, wanted_modes
from .ops._library import is_captured

LossFn = Callable[[nn.Module, Any], Tensor]

# Of ranks chosen by energy. Rows of a multiple of 8 numbers of 16 bits start where vectors of 16
# bytes can be read; with any other rank every product with the factor is far slower on a GPU.
RANK_MULTIPLE = 8


class _Cast(NamedTuple):
    factor: Tensor
    version: int  # of `factor` when it was cast
    cast: Tensor


class Basis(nn.Module):
    """Orthogonal factors of the weight gradient, strongest first (paper section 3.1).

    A module without parameters or `state_dict` entries, so that layers can share one through
    `.to(device)`, copying and pickling.

    Args:
        u: input basis `[r_in, in]`, orthonormal rows, or None: the identity.
        v: output basis `[r_out, out]`, orthonormal rows, dtype and device of `u`, or None. One of
            the two has to be there.
        energy_in, energy_out: the squared singular values of the gradient's unfoldings, `[in]`
            and `[out]`, descending, also where the factors are truncated; None: not known.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or rows are not orthonormal.
    """

    u: Tensor | None
    v: Tensor | None
    energy_in: Tensor | None
    energy_out: Tensor | None

    def __init__(
        self,
        u: Tensor | None = None,
        v: Tensor | None = None,
        energy_in: Tensor | None = None,
        energy_out: Tensor | None = None,
    ) -> None:
        self._set_up()
        if u is None and v is None:
            raise ValueError("a basis needs u or v: without both a layer takes basis=None")
        if u is not None and v is not None and (u.dtype != v.dtype or u.device != v.device):
            raise ValueError(
                f"v must have dtype and device of u, {u.dtype} on {u.device}, "
                f"got {v.dtype} on {v.device}"
            )
        for name, factor, energy in (("u", u, energy_in), ("v", v, energy_out)):
            if factor is None:
                if energy is not None:
                    raise ValueError(f"the energy of {name} is given, but no {name}")
                continue
            _check_factor(name, factor)
            if energy is not None and energy.shape != factor.shape[1:]:
                raise ValueError(
                    f"the energy of {name} must have shape {tuple(factor.shape[1:])}, "
                    f"got {tuple(energy.shape)}"
                )
        for name, tensor in zip(
            ("u", "v", "energy_in", "energy_out"), (u, v, energy_in, energy_out), strict=True
        ):
            # Rows in one piece, as the fold reads them: `qr` and `eigh` return columns.
            value = None if tensor is None else tensor.detach().contiguous()
            self.register_buffer(name, value, persistent=False)

    def _set_up(self) -> None:
        super().__init__()
        self._casts: dict[str, _Cast] = {}
        # Casts that CUDA graphs read at each replay, at the address they had.
        self._captured: list[Tensor] = []

    @property
    def rank_in(self) -> int | None:
        """Rows of `u`; None: it is the identity, of whatever size."""
        return None if self.u is None else self.u.shape[0]

    @property
    def rank_out(self) -> int | None:
        """Rows of `v`; None: it is the identity, of whatever size."""
        return None if self.v is None else self.v.shape[0]

    @property
    def in_features(self) -> int | None:
        """Columns of `u`; None: it fits any input."""
        return None if self.u is None else self.u.shape[1]

    @property
    def out_features(self) -> int | None:
        """Columns of `v`; None: it fits any output."""
        return None if self.v is None else self.v.shape[1]

    @property
    def is_truncated(self) -> bool:
        factors = (factor for factor in (self.u, self.v) if factor is not None)
        return any(factor.shape[0] < factor.shape[1] for factor in factors)

    def truncate(
        self,
        energy: float | None = None,
        rank_in: int | None = None,
        rank_out: int | None = None,
    ) -> Basis:
        """The leading vectors: those that hold `energy` of the total in each mode, or ranks.

        Args:
            energy: at least this share is kept: the fewest vectors that hold it, rounded up to a
                multiple of 8, which GPUs multiply fastest, or else all that there are.
            rank_in, rank_out: how many vectors, taken as given; None: all.

        Raises:
            ValueError: `energy` is outside (0, 1], not known, or more than the factors still hold;
                a rank is outside what there is; neither is given, or both.
        """
        if (energy is None) == (rank_in is None and rank_out is None):
            raise ValueError("truncate needs energy, or rank_in and rank_out, not both")
        kept: dict[str, Tensor | None] = {}
        for name, mode, rank in (("u", "in", rank_in), ("v", "out", rank_out)):
            factor, spectrum = getattr(self, name), getattr(self, f"energy_{mode}")
            limit = 0 if factor is None else factor.shape[0]
            if energy is not None and factor is not None:
                rank = energy_rank(f"energy_{mode}", spectrum, energy, limit)
            if rank is not None and not limit:
                raise ValueError(f"rank_{mode} needs {name}, which this basis has not")
            if rank is not None and not 1 <= rank <= limit:
                raise ValueError(f"rank_{mode} must lie in [1, {limit}], got {rank}")
            kept[name] = None if factor is None else factor[:rank].clone()
        return Basis(**kept, energy_in=self.energy_in, energy_out=self.energy_out)

    def select(self, mode_in: bool, mode_out: bool) -> Basis:
        """The same factors for the modes asked for, memory shared; the identity for the other.

        Raises:
            ValueError: it lacks a factor that is asked for, or none is.
        """
        if not (mode_in or mode_out):
            raise ValueError("mode_in or mode_out must be asked for")
        if (mode_in and self.u is None) or (mode_out and self.v is None):
            raise ValueError(f"the basis has no {'u' if self.u is None else 'v'}")
        chosen = Basis.__new__(Basis)
        chosen._set_up()
        for name, buffer in self._buffers.items():
            wanted = mode_in if name in ("u", "energy_in") else mode_out
            chosen.register_buffer(name, buffer if wanted else None, persistent=False)
        return chosen

    def matches(self, tensor: Tensor) -> bool:
        """Whether the factors have the tensor's device and dtype."""
        factor = cast(Tensor, self.v if self.u is None else self.u)
        return factor.dtype == tensor.dtype and factor.device == tensor.device

    def matching(self, tensor: Tensor) -> Basis:
        """Another basis with the tensor's device and dtype; memory is shared where it can be."""
        # A basis rounded to half precision is not orthonormal to the last bit: no check again.
        copied = Basis.__new__(Basis)
        copied._set_up()
        for name, buffer in self._buffers.items():
            value = None
            if buffer is not None:
                dtype = tensor.dtype if name in ("u", "v") else buffer.dtype
                value = buffer.to(tensor.device, dtype)
            copied.register_buffer(name, value, persistent=False)
        return copied

    def factor(self, name: Literal["u", "v"], dtype: torch.dtype) -> Tensor | None:
        """`u` or `v` in `dtype`; a cast is kept, for all layers of a group ask at every step."""
        factor = self._buffers[name]
        if factor is None or factor.dtype == dtype:
            return factor
        kept = self._casts.get(name)
        if (
            kept is not None
            and kept.factor is factor
            and kept.version == factor._version
            and kept.cast.dtype == dtype
        ):
            if is_captured(factor) and all(cast is not kept.cast for cast in self._captured):
                self._captured.append(kept.cast)
            return kept.cast
        made = factor.to(dtype)
        if _can_be_kept(made) and not factor.is_inference():  # those have no version
            self._casts[name] = _Cast(factor, factor._version, made)
        return made

    def _apply(self, fn, recurse: bool = True):
        self._casts.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_casts": {}, "_captured": []}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, without those not known."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        save_safetensors(self.tensors(), Path(path), {"kind": "sparsegrad_kernels.Basis"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Basis:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no basis.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no basis file at {os.fspath(path)}")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {"u", "v"} & names:
                raise ValueError(f"{os.fspath(path)} holds no basis: its tensors are {names}")
            return cls(**{name: file.get_tensor(name) for name in names})

    def extra_repr(self) -> str:
        modes = (("in", self.u), ("out", self.v))
        return ", ".join(
            f"{mode}={factor.shape[1]}, rank_{mode}={factor.shape[0]}"
            for mode, factor in modes
            if factor is not None
        )


def _can_be_kept(made: Tensor) -> bool:
    """Whether a tensor made now serves later calls, which may be of another kind."""
    # Inference tensors cannot be trained with; a tracer's are no numbers; and what a CUDA graph
    # makes while it is captured holds nothing before the graph is replayed.
    return type(made) is Tensor and not made.is_inference() and not is_captured(made)


def _check_factor(name: str, factor: Tensor) -> None:
    if factor.dim() != 2 or not factor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating matrix, got {factor.dtype} of shape {tuple(factor.shape)}"
        )
    rank, size = factor.shape
    if not 1 <= rank <= size:
        raise ValueError(
            f"{name} must have 1 to {size} rows for {size} columns, got shape {tuple(factor.shape)}"
        )
    if factor.is_meta:
        return
    # z -> z factor keeps lengths if and only if the rows are orthonormal: probe, do not square.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(8, rank, dtype=torch.float64, generator=generator).to(factor.device)
    probe = probe.to(torch.promote_types(factor.dtype, torch.float32))
    ratio = (probe @ factor.to(probe.dtype)).norm(dim=1) / probe.norm(dim=1)
    tolerance = 100 * torch.finfo(factor.dtype).eps ** 0.75
    if not bool(((ratio - 1).abs() < tolerance).all()):
        raise ValueError(f"the rows of {name} are not orthonormal")


def energy_rank(name: str, spectrum: Tensor | None, energy: float, limit: int) -> int:
    """How many of `limit` leading vectors `Basis.truncate` keeps; `name` is the spectrum's."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    if spectrum is None:
        raise ValueError(f"energy needs the spectrum, and this basis has no {name}")
    share = spectrum.double().cumsum(0) / spectrum.double().sum()
    # energy=1 asks for everything, also where the last vectors hold less than a rounding error.
    rank = len(share) if energy == 1 else int((share < energy).sum()) + 1
    if rank > limit:
        raise ValueError(f"energy {energy} needs {rank} vectors, this basis has {limit}")
    return min(math.ceil(rank / RANK_MULTIPLE) * RANK_MULTIPLE, limit)


class _GramHosvd:
    """Streams `sum G^T G` and `sum G G^T`, of the modes asked for: float64, `n^2` numbers each."""

    def __init__(self, mode_in: bool = True, mode_out: bool = True) -> None:
        self.modes = [name for name, wanted in (("in", mode_in), ("out", mode_out)) if wanted]
        self.grams: dict[str, Tensor] = {}

    def add(self, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        for mode in self.modes:
            gram = gradient.T @ gradient if mode == "in" else gradient @ gradient.T
            if mode in self.grams:
                self.grams[mode] += gram
            else:
                self.grams[mode] = gram.double()

    def basis(self, dtype: torch.dtype) -> Basis:
        found: dict[str, Tensor] = {}
        for mode, gram in self.grams.items():
            energy, vectors = torch.linalg.eigh(gram)
            factor = vectors.flip(1).T.contiguous().to(dtype)
            found |= _named(mode, factor, energy.flip(0).clamp_(min=0))
        return Basis(**found)


class _TensorlyHosvd:
    """Stacks the gradients, as the paper does, and leaves the decomposition to tensorly."""

    def __init__(self, mode_in: bool = True, mode_out: bool = True) -> None:
        try:
            import tensorly
        except ImportError:
            raise ImportError(
                'method="tensorly" needs tensorly: pip install "sparsegrad_kernels[tensorly]"'
            ) from None
        self._backend = tensorly.backend_context("pytorch", local_threadsafe=True)
        self.modes = [n for n, wanted in ((0, mode_out), (1, mode_in)) if wanted]
        self.gradients: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        self.gradients.append(gradient.to(dtype, copy=True))

    def basis(self, dtype: torch.dtype) -> Basis:
        from tensorly.decomposition import partial_tucker

        stacked = torch.stack(self.gradients, dim=-1)  # [out, in, steps * blocks]
        with self._backend, warnings.catch_warnings():
            # It completes the factors where an unfolding has fewer columns than rows, and warns.
            warnings.filterwarnings("ignore", message="Trying to compute SVD")
            # No iterations: its initialisation is the HOSVD itself.
            (core, factors), _ = partial_tucker(
                stacked,
                rank=[stacked.shape[mode] for mode in self.modes],
                modes=self.modes,
                n_iter_max=0,
                init="svd",
            )
        found: dict[str, Tensor] = {}
        for mode, factor in zip(self.modes, factors, strict=True):
            energy = core.square().sum([axis for axis in range(3) if axis != mode])
            found |= _named(("out", "in")[mode], factor.T.contiguous().to(dtype), energy)
        return Basis(**found)


def _named(mode: str, factor: Tensor, energy: Tensor) -> dict[str, Tensor]:
    return {"u" if mode == "in" else "v": factor, f"energy_{mode}": energy}


_METHODS: dict[str, Callable[[bool, bool], _GramHosvd | _TensorlyHosvd]] = {
    "gram": _GramHosvd,
    "tensorly": _TensorlyHosvd,
}


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if hasattr(batch, "keys") else model(batch)
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            "the model's output has no scalar loss: put labels in the batches, or give "
            "loss_fn(model, batch)"
        )
    return loss


def _repeat(batches: Iterable[Any], n_steps: int) -> Iterator[Any]:
    """`n_steps` batches, from the start again where they end earlier."""
    given = 0
    while given < n_steps:
        before = given
        for batch in batches:
            given += 1
            yield batch
            if given == n_steps:
                return
        if given == before:
            raise ValueError(
                f"batches ended after {given} of n_steps={n_steps} and cannot be started again"
            )


@contextlib.contextmanager
def _only_targets_train(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Train mode, gradients for `weights` alone; everything as it was on leaving."""
    parameters = list(model.parameters())
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        try:
            for p in parameters:
                p.grad = None
                p.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            model.train()
            with torch.enable_grad():
                yield
        finally:
            for p, requires_grad, grad in flags:
                p.requires_grad_(requires_grad)
                p.grad = grad
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def fit_basis(
    model: nn.Module,
    batches: Iterable[Any],
    config: SparseGradConfig | None = None,
    n_steps: int = 30,
    method: Literal["gram", "tensorly"] = "gram",
    loss_fn: LossFn | None = None,
    progress: bool = True,
) -> dict[str, Basis]:
    """The preliminary phase: gradients of `n_steps` batches, and the HOSVD of their stack.

    The model is trained in no way: its weights, buffers, `requires_grad`, mode, gradients and the
    random state are as before when this returns, and when it raises. Memory is that of one weight
    gradient and `in^2` and `out^2` float64 numbers per group, of the modes asked for, whatever the
    number of steps and blocks (`method="tensorly"` stacks all gradients, as the paper does).

    Args:
        model: the model, before `convert`.
        batches: any iterable of what the model takes, on its device; started again if it ends.
        config: which linears, which modes, and whether layers of the same role share a basis.
        n_steps: how many backward passes; the paper takes 30.
        method: "gram" streams, "tensorly" is for comparison.
        loss_fn: `loss_fn(model, batch)`, a scalar; by default `model(**batch).loss`, or the output
            itself where that is a scalar.
        progress: show a progress bar with the loss.

    Returns:
        By group (the role, such as "intermediate.dense"; the module's name with per-layer bases)
        a full `Basis`, in the dtype of the weights (float32 for half precision) on their device.

    Raises:
        ValueError: nothing to fit, `batches` ends too early, a loss is not finite or not scalar.
    """
    config = SparseGradConfig() if config is None else config
    if method not in _METHODS:
        raise ValueError(f"method must be one of {list(_METHODS)}, got {method!r}")
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    targets = find_targets(model, config)
    sums = {
        target.group: _METHODS[method](*wanted_modes(config.modes, target.shape))
        for target in targets.values()
    }
    seen: dict[str, torch.dtype] = {}

    def collector(target: Target) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            gradient = linear_view(target.module, cast(Tensor, weight.grad))
            sums[target.group].add(gradient)
            seen[target.group] = torch.promote_types(gradient.dtype, torch.float32)
            weight.grad = None

        return collect

    loss_fn = _default_loss if loss_fn is None else loss_fn
    weights = [cast(nn.Parameter, target.module.weight) for target in targets.values()]
    with _only_targets_train(model, weights), contextlib.ExitStack() as hooks:
        for weight, target in zip(weights, targets.values(), strict=True):
            hooks.callback(weight.register_post_accumulate_grad_hook(collector(target)).remove)
        bar = tqdm(total=n_steps, desc="basis", unit="step", disable=not progress)
        hooks.callback(bar.close)
        for step, batch in enumerate(_repeat(batches, n_steps)):
            loss = loss_fn(model, batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"the loss of batch {step} is {value}")
            loss.backward()
            bar.set_postfix(loss=f"{value:.4f}")
            bar.update()
    if unused := sorted(set(sums) - set(seen)):
        raise ValueError(f"no gradient reached {unused}: the loss does not depend on them")
    return {group: sums[group].basis(dtype) for group, dtype in seen.items()}
