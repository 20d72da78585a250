"""Fold a sparse update of the transformed space into the weight (design 2.2).

`W += V^T D~ U`, with `D~ [r_out, r_in]` given by its entries. `(V^T D~) U` or `V^T (D~ U)`,
whichever is cheaper; without `U` or `V`, the identity, that product is added as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_coo, check_like, check_matrix, check_tensor
from ._library import call_in_bounds, define
from ._rounding import round_stochastically


def _sparse_times(indices: Tensor, values: Tensor, size: tuple[int, int], b: Tensor) -> Tensor:
    """`S @ b` for sparse `S`, both in `b`'s dtype; entries given twice are summed."""
    s = torch.sparse_coo_tensor(indices, values, size, check_invariants=False)
    return torch.sparse.mm(s, b)


def _add_rows(weight: Tensor, basis: Tensor, indices: Tensor, values: Tensor) -> None:
    """`weight += D basis`: those of its rows in which D holds an entry."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows, row_of = indices[0].unique(return_inverse=True)
    cols, col_of = indices[1].unique(return_inverse=True)
    size = (len(rows), len(cols))
    entries = torch.stack([row_of, col_of])
    added = _sparse_times(entries, values.to(wide), size, basis[cols].to(wide))
    weight.index_copy_(0, rows, (weight[rows].to(wide) + added).to(weight.dtype))


def _reference(
    weight: Tensor, u: Tensor | None, v: Tensor | None, indices: Tensor, values: Tensor
) -> None:
    if u is None and v is None:
        weight.index_put_((indices[0], indices[1]), values, accumulate=True)
        return
    if u is None or v is None:
        if u is not None:
            _add_rows(weight, u, indices, values)
        elif v is not None:
            _add_rows(weight.T, v, indices.flip(0), values)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Only the rows R and columns C of D~ that hold an entry take part.
    rows, row_of = indices[0].unique(return_inverse=True)
    cols, col_of = indices[1].unique(return_inverse=True)
    u, v, values = u[cols].to(wide), v[rows].to(wide), values.to(wide)  # u [C, in], v [R, out]
    n, (n_cols, in_features), (n_rows, out_features) = len(values), u.shape, v.shape
    left_first = n * out_features + n_cols * in_features * out_features
    right_first = n * in_features + n_rows * in_features * out_features
    if left_first <= right_first:
        left = _sparse_times(torch.stack([col_of, row_of]), values, (n_cols, n_rows), v).T
        right = u
    else:
        left = v.T
        right = _sparse_times(torch.stack([row_of, col_of]), values, (n_rows, n_cols), u)
    if weight.dtype == wide:
        weight.addmm_(left, right)
    else:
        weight.copy_(torch.addmm(weight.to(wide), left, right))


def _reference_stochastic(
    weight: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    indices: Tensor,
    values: Tensor,
    seed: Tensor,
) -> None:
    total = weight.float().contiguous()
    u, v = (None if factor is None else factor.float() for factor in (u, v))
    _reference(total, u, v, indices, values.float())
    weight.copy_(round_stochastically(total, weight, seed))


def _fake(*args) -> None:
    return None


_op = define(
    "fold_(Tensor(a!) weight, Tensor? u, Tensor? v, Tensor indices, Tensor values) -> ()",
    _reference,
    _fake,
)
_op_stochastic = define(
    "_fold_stochastic_(Tensor(a!) weight, Tensor? u, Tensor? v, Tensor indices, Tensor values,"
    " Tensor seed) -> ()",
    _reference_stochastic,
    _fake,
)


def _check_seed(seed: object, weight: Tensor) -> None:
    check_tensor("seed", seed)
    assert isinstance(seed, Tensor)
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"with a seed, weight must be bfloat16 or float16 to be rounded, got {weight.dtype}"
        )
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
    if seed.device != weight.device:
        raise ValueError(
            f"seed must be on the device of weight, {weight.device}, got {seed.device}"
        )


def fold_(
    weight: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    indices: Tensor,
    values: Tensor,
    seed: Tensor | None = None,
) -> None:
    """`weight += v.T @ D @ u`, in place, for the sparse `D [r_out, r_in]` given as COO.

    Args:
        weight: `[out, in]`, updated in place.
        u: `[r_in, in]`, the leading rows of the input basis, or None: the identity.
        v: `[r_out, out]`, the leading rows of the output basis, or None: the identity.
        indices: `[2, k]` int64; entries given twice are summed.
        values: `[k]`, dtype and device of `weight`.
        seed: one int64 on the device of `weight`, bfloat16 or float16, which is then rounded
            stochastically: an update smaller than half the gap between two numbers is kept on
            average, not lost. A seed gives the same bits each time, so pass another each step.
            None: round to nearest.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device, or indices out of bounds
            (checked on the CPU).
    """
    check_matrix("weight", weight)
    rank = [weight.shape[0], weight.shape[1]]
    for axis, (name, factor) in enumerate((("v", v), ("u", u))):
        if factor is None:
            continue
        check_matrix(name, factor)
        check_like(name, factor, "weight", weight)
        if factor.shape[1] != weight.shape[axis]:
            raise ValueError(
                f"{name} must have {weight.shape[axis]} columns for weight "
                f"{tuple(weight.shape)}, got shape {tuple(factor.shape)}"
            )
        rank[axis] = factor.shape[0]
    shape = (rank[0], rank[1])
    check_coo(indices, values, "weight", weight)
    if seed is not None:
        _check_seed(seed, weight)
    if not values.shape[0]:
        return
    if seed is None:
        call_in_bounds("fold_", _op, indices, shape, weight, u, v, indices, values)
    else:
        name = "_fold_stochastic_"
        call_in_bounds(
            name, _op_stochastic, indices, shape, weight, u, v, indices, values, seed.view(1)
        )
