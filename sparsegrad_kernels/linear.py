"""SparseGradLinear: a linear layer whose weight gradient is sparse in an HOSVD basis.

With `x~ = x U^T`, `g~ = g V^T` (design section 1) the gradient of the transformed weight
`W~ = V W U^T` is `G~ = g~^T x~ = V (g^T x) U^T`, of which the k largest entries survive.
"""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter
from torch.autograd.function import once_differentiable

from ._gradient import backward, fold_delta
from .basis import Basis
from .config import check_delta_dtype
from .ops._library import (
    define,
    has_kernel,
    is_captured,
    multiplying_as_tf32,
    without_autocast,
)

WeightSpace = Literal["original", "transformed"]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_target: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    k: int,
    threshold: Tensor | None,
) -> Tensor:
    weight = weight.to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _forward_fake(x, weight, bias, grad_target, u, v, k, threshold) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_op(g, x, weight, u, v, k, size, dtype, bias_dtype) -> tuple[Tensor, ...]:
    # An operator's schema has no optional results: an empty tensor stands for None.
    gradients = backward(g, x, weight, u, v, k, size, dtype, bias_dtype)
    return tuple(g.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(g, x, weight, u, v, k, size, dtype, bias_dtype) -> tuple[Tensor, ...]:
    grad_input = grad_sparse = grad_bias = None
    if weight is not None:
        grad_input = g.new_empty(*g.shape[:-1], weight.shape[1])
    if x is not None:
        indices, values = g.new_empty((2, k), dtype=torch.int64), g.new_empty(k, dtype=dtype)
        grad_sparse = torch.sparse_coo_tensor(
            indices, values, size, is_coalesced=True, check_invariants=False
        )
    if bias_dtype is not None:
        grad_bias = g.new_empty(g.shape[-1], dtype=bias_dtype)
    gradients = (grad_input, grad_sparse, grad_bias)
    return tuple(g.new_empty(0) if gradient is None else gradient for gradient in gradients)


_fold_delta_op = define(
    "_fold_delta_(Tensor(a!) weight, Tensor(b!) delta, Tensor? u, Tensor? v, int k, "
    "Tensor(c!)? seed) -> ()",
    fold_delta,
    lambda weight, delta, u, v, k, seed: None,
)
_linear_op = define(
    "_linear(Tensor x, Tensor weight, Tensor? bias, Tensor grad_target, Tensor? u, Tensor? v, "
    "int k, Tensor? threshold) -> Tensor",
    _forward,
    _forward_fake,
)
_linear_backward_op = define(
    "_linear_backward(Tensor g, Tensor? x, Tensor? weight, Tensor? u, Tensor? v, int k, "
    "int[] size, ScalarType dtype, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)


def _save(ctx: Any, x, weight, bias, grad_target, u, v, k, threshold) -> None:
    """Keep for the backward pass what `nn.Linear` keeps: the input, and parameters."""
    need_input, _, need_bias, need_sparse = ctx.needs_input_grad[:4]
    ctx.save_for_backward(x if need_sparse else None, weight if need_input else None, u, v)
    ctx.k, ctx.size, ctx.dtype = k, list(grad_target.shape), grad_target.dtype
    ctx.bias_dtype = bias.dtype if need_bias else None
    # Not saved as the others are: each backward pass changes it, for the next one.
    ctx.threshold = threshold


class SparseGradFunction(torch.autograd.Function):
    """`y = x W^T + b`, whose backward sends the COO gradient to `grad_target` (paper Table 2)."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, grad_target, u, v, k, threshold) -> Tensor:
        _save(ctx, x, weight, bias, grad_target, u, v, k, threshold)
        return _forward(x, weight, bias, grad_target, u, v, k, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):
        settings = (ctx.k, ctx.size, ctx.dtype, ctx.bias_dtype, ctx.threshold)
        grad_input, grad_sparse, grad_bias = without_autocast(
            g.device.type, backward, g, *ctx.saved_tensors, *settings
        )
        return grad_input, None, grad_bias, grad_sparse, None, None, None, None


# The same for torch.compile, which cannot trace a Function that makes a sparse tensor. Nor can it
# functionalize an operator that makes one and writes to an argument: no threshold is carried here.
def _setup_context(ctx: Any, inputs, output) -> None:
    _save(ctx, *inputs)


def _compiled_backward(ctx: Any, g: Tensor):
    x, weight, u, v = ctx.saved_tensors
    grad_input, grad_sparse, grad_bias = _linear_backward_op(
        g, x, weight, u, v, ctx.k, ctx.size, ctx.dtype, ctx.bias_dtype
    )
    return (
        None if weight is None else grad_input,
        None,
        None if ctx.bias_dtype is None else grad_bias,
        None if x is None else grad_sparse,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "sparsegrad_kernels::_linear", _compiled_backward, setup_context=_setup_context
)


# All that live, oldest first. Not by parameter: torch may put another one in its place.
_layers: weakref.WeakValueDictionary[int, SparseGradLinear] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def find_layers() -> dict[int, SparseGradLinear]:
    """The layer of each parameter with a sparse gradient, by the parameter's `id`.

    Of layers that share one, as shallow copies do, the oldest.
    """
    found: dict[int, SparseGradLinear] = {}
    for layer in list(_layers.values()):
        found.setdefault(id(layer.sparse_parameter), layer)
    return found


def is_stored(delta: Tensor) -> bool:
    """Whether a `delta` has memory for each entry. Else it is one zero, seen as a matrix."""
    return delta.stride() != (0, 0)


class SparseGradLinear(nn.Module):
    """A drop-in for `nn.Linear` that trains about 1% of its weight per step (paper section 3.2).

    In `weight_space="original"` (the default), `weight [out, in]` is the plain weight and takes no
    gradient; the parameter `delta [r_out, r_in]` is zero, receives the COO gradient of the
    transformed space, and what any optimizer writes into it is folded into the weight,
    `W += V^T delta U` (`delta` is then zero again), before the weight is used: in `forward`, on
    reading `layer.weight`, in `state_dict`, `to_linear`, `eval`, copying, pickling and moving.
    Only iterating `named_parameters()` shows the stored tensor as it is: call `fold()` first.
    `sparsegrad_kernels.SparseAdam` folds each update in its own step: it gives the memory of
    `delta` back (which is then one zero, seen as a matrix), and no other optimizer can take over.
    The forward costs what `nn.Linear` costs, and `state_dict` is that of an `nn.Linear`.

    In `weight_space="transformed"` the layer is the paper's Table 2 to the letter: three products,
    and the parameter `weight [r_out, r_in]` is `W~ = V W U^T`, which receives the COO gradient. Its
    `state_dict` holds the basis too, since the weight means nothing without it.

    After a forward pass in bfloat16 (autocast) a GPU folds updates in a basis of both modes by
    products in bfloat16, after one in float16 by tf32: the update has then the digits that its
    gradient had, and the weight its own.

    Both spaces give the same training. Each backward keeps the k largest entries of its own
    gradient; several before a step add up, as sparse gradients do, to the union of their entries.
    `bias` has its dense gradient in the original space.

    Args:
        in_features, out_features: sizes of a token's input and output.
        basis: `Basis` for these sizes, of both modes or one, full or truncated; None is the
            identity, which makes the layer MeProp (Sun et al., 2017).
        bias: whether there is one.
        k: how many entries of the gradient to keep, at most `r_out * r_in`.
        density: `k` as a share of `in_features * out_features`, where `k` is None.
        weight_space: "original" or "transformed".
        stochastic_rounding: of a bfloat16 or float16 weight when updates are folded in (original
            space): those too small to change it by rounding to nearest then do so on average.
        delta_dtype: of `delta` (original space), its gradient and so the optimizer's moments, also
            after `.to(dtype)`; None: the weight's. `torch.bfloat16` halves what training adds to
            float32 weights: the update then has bfloat16's digits, the weight keeps its own. On a
            GPU torch's `GradScaler` takes no gradients in bfloat16: use bfloat16 autocast.
        device, dtype: of the parameters.

    Shape:
        input `[*, in_features]`, output `[*, out_features]`.

    Raises:
        TypeError, ValueError: an argument is out of range or does not fit the others.
    """

    # Of layers that an older version of this package pickled.
    _is_compiled = _is_in_graph = False

    delta: nn.Parameter | None
    bias: nn.Parameter | None
    basis: Basis | None
    residual: Tensor | None
    threshold: Tensor
    seed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: Basis | None = None,
        bias: bool = True,
        k: int | None = None,
        density: float = 0.01,
        weight_space: WeightSpace = "original",
        stochastic_rounding: bool = False,
        delta_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        settings = (basis, k, density, weight_space, stochastic_rounding, delta_dtype)
        self._set_up(linear.weight.data, linear.bias, *settings)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        basis: Basis | None = None,
        k: int | None = None,
        density: float = 0.01,
        weight_space: WeightSpace = "original",
        stochastic_rounding: bool = False,
        delta_dtype: torch.dtype | None = None,
    ) -> SparseGradLinear:
        """A layer with a copy of the linear's parameters, on its device, in its dtype and mode."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = linear.weight.detach().clone()
        bias = None
        if linear.bias is not None:
            bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        settings = (basis, k, density, weight_space, stochastic_rounding, delta_dtype)
        layer._set_up(weight, bias, *settings)
        return layer.train(linear.training)

    def _set_up(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        basis: Basis | None,
        k: int | None,
        density: float,
        weight_space: str,
        stochastic_rounding: bool,
        delta_dtype: torch.dtype | None,
    ) -> None:
        if weight_space not in ("original", "transformed"):
            raise ValueError(
                f'weight_space must be "original" or "transformed", got {weight_space!r}'
            )
        if stochastic_rounding and (
            weight_space != "original" or weight.dtype not in (torch.bfloat16, torch.float16)
        ):
            raise ValueError(
                "stochastic_rounding is for bfloat16 or float16 weights in the original space, "
                f"got {weight.dtype} in the {weight_space} space"
            )
        if delta_dtype is not None:
            check_delta_dtype(delta_dtype, weight_space)
        self.out_features, self.in_features = weight.shape
        self.weight_space = weight_space
        self.delta_dtype = delta_dtype
        shape = self._gradient_shape(basis)
        self.k = self._resolve_k(k, density, shape)
        # The optimizer's write into `delta` is noticed by its version; None: look at its content.
        self._folded_version: int | None = None
        # Compiled code folds too, and so must the layer from then on, for nothing counts versions;
        # nor do the replays of a CUDA graph, whose memory `delta` then is.
        self._is_compiled = self._is_in_graph = False
        # Of the last forward. After one in 16 bits the update needs no more digits than those.
        self._computes_in: torch.dtype | None = None
        # Shared by all layers of a group, also through `.to(device)`: a submodule is moved once.
        if basis is not None and not basis.matches(weight):
            basis = basis.matching(weight)
        self.basis = basis
        if weight_space == "original":
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.delta = nn.Parameter(weight.new_zeros(shape, dtype=delta_dtype))
            self.register_buffer("residual", None)
        else:
            transformed, residual = _transform(weight, self.basis)
            self.weight = nn.Parameter(transformed)
            self.register_parameter("delta", None)
            self.register_buffer("residual", residual)
        self.register_parameter("bias", bias)
        _layers[next(_numbers)] = self
        # What the last step's selection came to, where it is fused with a product (on a GPU).
        unknown = torch.full((1,), torch.nan, dtype=torch.float32, device=weight.device)
        self.register_buffer("threshold", unknown, persistent=False)
        seed = torch.randint(2**62, (1,)).to(weight.device) if stochastic_rounding else None
        self.register_buffer("seed", seed, persistent=False)

    @property
    def sparse_parameter(self) -> nn.Parameter:
        """The one that receives the COO gradient, as it is stored."""
        name = "weight" if self.weight_space == "transformed" else "delta"
        return cast(nn.Parameter, self._parameters[name])

    def _gradient_shape(self, basis: Basis | None) -> tuple[int, int]:
        if basis is None:
            return self.out_features, self.in_features
        if not isinstance(basis, Basis):
            raise TypeError(f"basis must be a Basis or None, got {type(basis).__name__}")
        for name, got, wanted in (
            ("u", basis.in_features, self.in_features),
            ("v", basis.out_features, self.out_features),
        ):
            if got is not None and got != wanted:
                raise ValueError(
                    f"basis is for another shape: its {name} has {got} columns, "
                    f"the layer needs {wanted}"
                )
        return basis.rank_out or self.out_features, basis.rank_in or self.in_features

    def _resolve_k(self, k: int | None, density: float, shape: tuple[int, int]) -> int:
        if k is None:
            if not 0 < density <= 1:
                raise ValueError(f"density must lie in (0, 1], got {density}")
            k = max(1, round(density * self.in_features * self.out_features))
        elif isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int or None, got {type(k).__name__}")
        elif k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return min(k, shape[0] * shape[1])

    @property
    def u(self) -> Tensor | None:
        """Input basis `[r_in, in]`, or None: the identity."""
        return None if self.basis is None else self.basis.u

    @property
    def v(self) -> Tensor | None:
        """Output basis `[r_out, out]`, or None: the identity."""
        return None if self.basis is None else self.basis.v

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """`u` and `v`, in the dtype that the backward pass computes in."""
        basis = self.basis
        if basis is None:
            return None, None
        if torch.compiler.is_compiling():
            return basis.u, basis.v
        return basis.factor("u", dtype), basis.factor("v", dtype)

    @property
    def weight(self) -> nn.Parameter:
        """`W [out, in]` with all updates folded in, or `W~ [r_out, r_in]` (transformed space)."""
        stored = self._parameters.get("weight")
        if stored is None:
            raise AttributeError("weight")
        self.fold()
        return stored

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.register_parameter("weight", value)

    def fold(self) -> None:
        """Fold what an optimizer wrote into `delta` into `weight` (design 2.2), in place.

        Raises:
            RuntimeError: `delta` has no memory, and something else than `SparseAdam` wrote into it.
        """
        delta = self._parameters.get("delta")
        if delta is None:
            return
        if torch.compiler.is_compiling():
            if is_stored(delta):
                stored = self._parameters["weight"]
                with torch.no_grad():
                    _fold_delta_op(stored, delta, self.u, self.v, self.k, self.seed)
                self._is_compiled = True  # compiled code cannot ask whether it is captured
            return
        if not is_stored(delta):
            _check_not_written(delta)
            return
        is_known = delta._version != self._folded_version
        self._is_in_graph = self._is_in_graph or is_captured(delta)
        if self._is_in_graph or self._is_compiled or is_known:
            # Where torch knows of no write, mostly nothing is there: autograd is not told of any.
            weight = cast(Tensor, self._parameters["weight"])
            with nullcontext() if is_known else _unsafe_preserve_version_counter(weight):
                self.fold_update(delta)
            self._folded_version = delta._version

    @torch.no_grad()
    def fold_update(self, update: Tensor) -> None:
        """`weight += V^T update U`, in place, then `update [r_out, r_in]` is zero: see `fold`."""
        weight, u, v = cast(Tensor, self._parameters["weight"]), self.u, self.v
        is_narrow = self._computes_in in (torch.bfloat16, torch.float16)
        as_tf32 = is_narrow and u is not None and v is not None
        if as_tf32 and self._computes_in is torch.bfloat16 and _folds_rounded(weight):
            as_tf32, (u, v) = False, self._factors(torch.bfloat16)
        with multiplying_as_tf32(as_tf32):
            _fold_delta_op(weight, update, u, v, self.k, self.seed)

    def forgo_delta(self) -> bool:
        """Give the memory of `delta` back, for an optimizer that calls `fold_update` in its step.

        False: there is no `delta`, it is frozen, or a CUDA graph holds its memory.
        """
        delta = self._parameters.get("delta")
        if delta is None:
            return False
        if is_stored(delta):
            self.fold()
            if self._is_in_graph or not delta.requires_grad:
                return False
            _give_back(delta)
        return True

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight of the equal `nn.Linear`, a new tensor `[out, in]`."""
        weight = self.weight.detach()
        if self.weight_space == "original":
            return weight.clone()
        weight = _rotated_back(weight, self.u, self.v)
        return weight.clone() if self.residual is None else weight + self.residual

    def to_linear(self) -> nn.Linear:
        """The equal `nn.Linear`, with a copy of the parameters."""
        weight = self.dense_weight()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        trained = cast(Tensor, self.weight if self.delta is None else self.delta)
        linear.weight = nn.Parameter(weight, trained.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"input must have {self.in_features} features in its last dimension, "
                f"got shape {tuple(x.shape)}"
            )
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        if self.weight_space == "original":
            self.fold()
            self._computes_in = x.dtype
            weight = self._parameters["weight"]
            u, v = self._factors(x.dtype)
            return _linear(x, weight, self.bias, self.delta, u, v, self.k, self.threshold)
        weight = self._parameters["weight"]
        if self.basis is None:
            return _linear(x, weight, self.bias, weight, None, None, self.k, self.threshold)
        u, v = self._factors(x.dtype)
        x_rotated = x if u is None else F.linear(x, u.to(x.dtype))
        y = _linear(x_rotated, weight, None, weight, None, None, self.k, self.threshold)
        if v is not None:
            y = y @ v.to(x.dtype)
        if self.residual is not None:
            y = y + F.linear(x, self.residual.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def train(self, mode: bool = True) -> SparseGradLinear:
        if not mode:
            self.fold()
        return super().train(mode)

    @property
    def stochastic_rounding(self) -> bool:
        return self.seed is not None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, k={self.k}, weight_space={self.weight_space!r}"
        )

    def _apply(self, fn, recurse: bool = True):
        self.fold()
        self._folded_version = None
        forgoes = self.delta is not None and not is_stored(self.delta)
        super()._apply(fn, recurse)
        if self.delta is not None and self.delta_dtype is not None:
            self.delta.data = self.delta.data.to(self.delta_dtype)
            if self.delta.grad is not None:
                self.delta.grad.data = self.delta.grad.data.to(self.delta_dtype)
        if forgoes:
            _give_back(cast(Tensor, self.delta))
        dtype = cast(Tensor, self._parameters["weight"]).dtype
        if dtype not in (torch.bfloat16, torch.float16):
            self.seed = None  # there is nothing to round
        self.threshold = self.threshold.float()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.fold()
        return {
            **self.__dict__,
            "_folded_version": None,
            "_is_compiled": False,
            "_is_in_graph": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "_always_folds"})
        is_shared = id(self.sparse_parameter) in find_layers()  # this is a shallow copy
        _layers[next(_numbers)] = self
        if self.delta is not None and not is_stored(self.delta) and not is_shared:
            self.delta.__dict__.pop("version_given_back", None)
            self.delta.data = self.delta.new_zeros(self.delta.shape)

    def _factors_of_the_weight(self) -> list[tuple[str, Tensor]]:
        """What `state_dict` holds besides `W~`, in the transformed space."""
        if self.weight_space == "original":
            return []
        factors = (("u", self.u), ("v", self.v))
        return [(name, factor) for name, factor in factors if factor is not None]

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "delta", None)
        for name, factor in self._factors_of_the_weight():
            destination[prefix + name] = factor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
    ) -> None:
        for name, factor in self._factors_of_the_weight():
            value = state_dict.pop(prefix + name, None)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != factor.shape:
                errors.append(
                    f"size mismatch for {prefix}{name}: {tuple(value.shape)} in the "
                    f"checkpoint, {tuple(factor.shape)} in the layer's basis"
                )
            else:
                setattr(self.basis, name, value.detach().clone().to(factor))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )
        if self.delta is not None:
            if prefix + "delta" in missing_keys:
                missing_keys.remove(prefix + "delta")
            # It replaces the weight that delta belongs to.
            if prefix + "weight" in state_dict and is_stored(self.delta):
                with torch.no_grad():
                    self.delta.zero_()


def _give_back(delta: Tensor) -> None:
    """Leave one zero of its memory."""
    if not hasattr(delta, "version_given_back"):
        # Compiled code cannot ask for a version: then each backward pass does.
        delta.register_post_accumulate_grad_hook(_check_not_written)
    delta.data = delta.new_zeros(()).as_strided(delta.shape, (0, 0))
    delta.version_given_back = delta._version  # type: ignore[attr-defined]


def _check_not_written(delta: Tensor) -> None:
    """Raise a RuntimeError where something wrote into a `delta` that has no memory; once."""
    if not is_stored(delta) and delta._version != getattr(
        delta, "version_given_back", delta._version
    ):
        _give_back(delta)
        raise RuntimeError(
            "delta was written, but a SparseAdam was made for this layer, which gave its memory "
            "back: the write is lost. Train with that optimizer only, or train a copy "
            "(copy.deepcopy) of the model, whose delta has its memory"
        )


def _folds_rounded(weight: Tensor) -> bool:
    """Whether the kernel that folds this weight takes bases in bfloat16."""
    return weight.dtype is torch.float32 and has_kernel("_fold_delta_", weight)


def _linear(*args) -> Tensor:
    return (_linear_op if torch.compiler.is_compiling() else SparseGradFunction.apply)(*args)


@torch.no_grad()
def _transform(weight: Tensor, basis: Basis | None) -> tuple[Tensor, Tensor | None]:
    """`W~ = V W U^T`, and what a truncated basis leaves over of `W`, else None."""
    if basis is None:
        return weight, None
    transformed = weight if basis.u is None else weight @ basis.u.T
    transformed = transformed if basis.v is None else basis.v @ transformed
    if not basis.is_truncated:
        return transformed, None
    return transformed, weight - _rotated_back(transformed, basis.u, basis.v)


def _rotated_back(transformed: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
    """`V^T W~ U`."""
    weight = transformed if u is None else transformed @ u
    return weight if v is None else v.T @ weight
