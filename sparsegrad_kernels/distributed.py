"""Data-parallel training: ranks average their sparse gradients as a backward pass makes them.

`DistributedDataParallel` reduces dense gradients, and sparse ones of embeddings alone. Each rank
keeps the k largest entries of its own gradient; their mean over the ranks has the union of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .linear import SparseGradLinear

Model = TypeVar("Model", bound=nn.Module)


def sync_sparse_gradients(model: Model, process_group: dist.ProcessGroup | None = None) -> Model:
    """Let every backward pass average the gradients of `SparseGradLinear` layers over the ranks.

    For a model that is then wrapped, which averages all other gradients and leaves these alone:
    `DistributedDataParallel(sync_sparse_gradients(model))`. The layers of all ranks become those
    of rank 0, bases included. From k entries of each rank a mean has up to ranks times k: the
    optimizer's step takes them all, whatever clips sees the mean.

    In each backward pass the ranks must come through the same layers, or they wait for each other;
    `no_sync()` does not spare this exchange. On a GPU the mean makes the host wait, so that a
    step cannot be captured in a CUDA graph. A copy of the model does not take part, nor does a
    layer that is frozen now and trained later: as with `DistributedDataParallel`, freeze first.

    Args:
        model: on its device; changed in place, and returned.
        process_group: the one that `DistributedDataParallel` is given; None: the default one.

    Raises:
        RuntimeError: `torch.distributed` has no process group yet.
        ValueError: the model has no `SparseGradLinear`, or the ranks' differ in shape, k or dtype.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("torch.distributed has no process group: call init_process_group first")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseGradLinear)}
    if not layers:
        raise ValueError("the model has no SparseGradLinear: DistributedDataParallel will do")
    _check_alike(layers, process_group)
    first = dist.get_global_rank(process_group, 0) if process_group is not None else 0
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    sent: set[int] = set()  # layers of a group share a basis
    for name, layer in layers.items():
        layer.fold()
        with torch.no_grad():
            for tensor in _state(layer):
                if id(tensor) not in sent:
                    dist.broadcast(tensor, first, process_group)
                    sent.add(id(tensor))
        param = layer.sparse_parameter
        if hasattr(param, "averaging"):
            param.averaging.remove()
        if param.requires_grad:
            averaging = _Averaging(process_group)
            param.averaging = param.register_hook(averaging)  # type: ignore[attr-defined]
        own = "weight" if layer.weight_space == "transformed" else "delta"
        # All ranks' buffers stay alike, or (a threshold) are each rank's own.
        buffers = [buffer_name for buffer_name, _ in layer.named_buffers()]
        for inner in (own, *buffers):
            # DistributedDataParallel puts a dot before what the model itself has, or does not.
            ignored |= {f"{name}.{inner}", f"{name}.{inner}".lstrip(".")}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    return model


def _state(layer: SparseGradLinear) -> Iterator[Tensor]:
    """What the layer computes with; what is left of `delta` was folded, and is zero everywhere."""
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name != "delta":
            yield tensor


def _check_alike(
    layers: dict[str, SparseGradLinear], process_group: dist.ProcessGroup | None
) -> None:
    """Else the ranks would wait for each other, or read what the others did not send."""
    mine = [
        (name, layer.k, [(tuple(t.shape), str(t.dtype)) for t in tensors], param.requires_grad)
        for name, layer in layers.items()
        for param in [layer.sparse_parameter]
        for tensors in [(param, *_state(layer))]
    ]
    found: list[object] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, mine, process_group)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise ValueError(
                f"model has other SparseGradLinear layers on rank {rank} than on rank 0: names, k, "
                "shapes, dtypes and what is trained must be the same. An energy keeps as many "
                "basis vectors as the batches ask for: fit the basis to the same ones everywhere, "
                "or load one file"
            )


class _Averaging:
    """What becomes of the gradient of one backward pass, before it is added to others."""

    __torch_unserializable__ = True  # torch.save is to leave it out, without a warning

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group

    @torch.no_grad()
    def __call__(self, grad: Tensor) -> Tensor:
        n_columns, kind = grad.shape[1], torch.int32 if grad.numel() < 2**31 else torch.int64
        rows, columns = grad._indices()
        linear = self._gather((rows * n_columns + columns).to(kind)).long()
        values = self._gather(grad._values())
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        indices = torch.stack([linear // n_columns, linear % n_columns])
        mean = torch.sparse_coo_tensor(
            indices,
            wide / dist.get_world_size(self.process_group),
            grad.shape,
            check_invariants=False,
        )
        return mean.coalesce().to(grad.dtype)

    def _gather(self, mine: Tensor) -> Tensor:
        """All ranks' one after another; each has k."""
        n_ranks = dist.get_world_size(self.process_group)
        gathered = mine.new_empty(n_ranks * mine.shape[0])
        dist.all_gather(list(gathered.chunk(n_ranks)), mine.contiguous(), self.process_group)
        return gathered
