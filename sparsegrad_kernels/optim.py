"""SparseAdam: one optimizer for sparse gradients (lazily) and dense ones (as AdamW)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .linear import SparseGradLinear, find_layers, is_stored
from .ops._library import is_sync_free
from .ops.sparse_adam_ import update_

_FUSED_DEVICES = ("cpu", "cuda")


def unique_entries(grad: Tensor, expected: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices and values of a COO matrix with entries given twice summed.

    Autograd drops the mark that a gradient is coalesced; seeing that it is costs less than sorting.
    On a GPU seeing it would make the host wait: there a gradient of as many entries as `expected`,
    the number that one backward pass of a `SparseGradLinear` makes, is taken to be one.
    """
    indices, values = grad._indices(), grad._values()
    if is_sync_free(grad):
        if grad.is_coalesced() or values.shape[0] == expected:
            return indices, values
        grad = grad.coalesce()
        return grad.indices(), grad.values()
    linear = indices[0] * grad.shape[1] + indices[1]
    if bool((linear[1:] > linear[:-1]).all()):
        return indices, values
    grad = grad.coalesce()
    return grad.indices(), grad.values()


class SparseAdam(Optimizer):
    """Sparse gradients as `torch.optim.SparseAdam`, dense ones as `torch.optim.AdamW`.

    A parameter with a COO gradient has its moments and itself updated at the gradient's entries
    only, without weight decay (paper section 5.1); entries given twice are summed, so gradients
    may be accumulated. All other parameters take AdamW's step. One `step` counter per parameter.

    The update of a `SparseGradLinear` is folded into its weight at once, so that its `delta` needs
    no memory, which this optimizer takes from it: what training adds to a weight is then two
    moments of the size of `delta`, or one where `betas[0]` is 0.

    Args:
        params: parameters or parameter groups; those without a gradient are left alone, so
            `model.parameters()` will do.
        lr: learning rate, at least 0. SparseGrad layers want about 1e-3 (design section 8).
        betas: decay of the two moments, each in [0, 1). With a first of 0 the first moment is the
            gradient, and for sparse gradients none is kept; steps are then not averaged, and bear
            no large rates (what was tried: benchmarks/results/README.md).
        eps: added to the root of the second moment.
        weight_decay: AdamW's, for dense gradients.
        capturable: keep the step counters on the parameters' device, so that `step` can be captured
            in a CUDA graph; as in torch's optimizers, `lr` may then be a tensor.

    Raises:
        ValueError: a hyperparameter is outside its range; or, in `step`, the gradient of a layer's
            `delta` is not sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        capturable: bool = False,
    ) -> None:
        if not float(lr) >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] must lie in [0, 1), got {beta}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "capturable": capturable,
        }
        self._workspaces: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        layers = find_layers()
        for param in self.param_groups[-1]["params"]:
            _forgoes_delta(param, layers.get(id(param)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._workspaces = {}

    def _workspace(self, param: Tensor) -> Tensor:
        """Zeros in the shape of a `delta`, for one update at a time; they stay where they are."""
        key = param.device, param.dtype, param.numel()
        if key not in self._workspaces:
            self._workspaces[key] = torch.zeros(key[2], dtype=param.dtype, device=param.device)
        return self._workspaces[key].view(param.shape)

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters with a gradient; the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = find_layers()
        for group in self.param_groups:
            dense: list[Tensor] = []
            sparse: list[Tensor] = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                is_sparse = param.grad.layout is torch.sparse_coo
                if _forgoes_delta(param, layers.get(id(param))) and not is_sparse:
                    raise ValueError(
                        "params has the delta of a SparseGradLinear, whose gradient must be sparse "
                        f"(COO), got layout {param.grad.layout}"
                    )
                state = self.state[param]
                if not state:
                    device = param.device if group["capturable"] else None
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                    state["exp_avg_sq"] = _moment_of(param)
                if is_sparse and group["betas"][0] == 0:
                    state.pop("exp_avg", None)
                elif "exp_avg" not in state:
                    state["exp_avg"] = _moment_of(param)
                (sparse if is_sparse else dense).append(param)
            if sparse:
                self._sparse_step(sparse, group, layers)
            if dense:
                self._dense_step(dense, group)
        return loss

    def _sparse_step(
        self, params: list[Tensor], group: dict[str, Any], layers: dict[int, SparseGradLinear]
    ) -> None:
        states = [self.state[param] for param in params]
        torch._foreach_add_([state["step"] for state in states], 1)
        capturable, lr, (beta1, beta2) = group["capturable"], group["lr"], group["betas"]
        rates: dict[torch.device, float | Tensor] = {}
        for param, state in zip(params, states, strict=True):
            if param.device not in rates:
                rates[param.device] = _rate(lr, param.device) if capturable else float(lr)
            layer = layers.get(id(param))
            indices, values = unique_entries(
                cast(Tensor, param.grad), None if layer is None else layer.k
            )
            folds = layer is not None and not is_stored(param)
            target = self._workspace(param) if folds else param
            try:
                update_(
                    target,
                    state.get("exp_avg"),
                    state["exp_avg_sq"],
                    indices,
                    values,
                    state["step"] if capturable else int(state["step"]),
                    rates[param.device],
                    beta1,
                    beta2,
                    group["eps"],
                )
                if folds:
                    cast(SparseGradLinear, layer).fold_update(target)
            except BaseException:
                if folds:
                    target.zero_()
                raise

    def _dense_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW's, in one pass over each parameter where torch has that for its device."""
        states = [self.state[param] for param in params]
        fused = all(param.device.type in _FUSED_DEVICES for param in params)
        if fused:  # wants the counters where the parameters are
            for param, state in zip(params, states, strict=True):
                if state["step"].device != param.device:
                    state["step"] = state["step"].to(param.device)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=None if not fused else False,
            fused=fused,
            capturable=group["capturable"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _forgoes_delta(param: Tensor, layer: SparseGradLinear | None) -> bool:
    """Whether `param` is the `delta` of its layer, which lets this optimizer fold its updates.

    From then on it has no memory (`is_stored`).
    """
    if layer is not None:
        return layer.delta is param and layer.forgo_delta()
    if param.dim() == 2 and not is_stored(param):
        raise RuntimeError(
            "params has the delta of a SparseGradLinear that is no more: there is nothing to train"
        )
    return False


def _moment_of(param: Tensor) -> Tensor:
    if param.dim() == 2 and not is_stored(param):
        return torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    return torch.zeros_like(param)


def _rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """As a tensor, so that a step with it can be captured."""
    if isinstance(lr, Tensor):
        return lr
    return torch.full((), lr, dtype=torch.float64, device=device)


def _norm_of_sparse(x: Tensor, ord=2, dim=None, keepdim=False, *, dtype=None) -> Tensor:
    if dim is not None:
        raise ValueError(f"the norm of a sparse tensor is that of all its entries, got dim={dim}")
    return torch.linalg.vector_norm(x.coalesce().values(), ord, dtype=dtype)


# PyTorch has no norm of COO tensors, which `torch.nn.utils.clip_grad_norm_` asks for, and so every
# training loop that clips, the one of transformers' Trainer included.
for _key in ("SparseCPU", "SparseCUDA"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::linalg_vector_norm", _key):
        torch.library.impl("aten::linalg_vector_norm", _key, _norm_of_sparse)
