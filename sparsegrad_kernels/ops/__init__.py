"""The operators: `torch.ops.sparsegrad_kernels.<name>`, checked and documented.

Each is defined in a module of its own name: schema, reference, fake, wrapper.
"""

from .compact_indices import compact_indices
from .fold_ import fold_
from .grad_weight_topk import grad_weight_topk
from .nonzero_rows_cols import nonzero_rows_cols
from .sparse_adam_ import sparse_adam_
from .sparse_dense_mm import sparse_dense_mm
from .sparse_dense_mm_coo import sparse_dense_mm_coo
from .topk_coo import topk_coo

__all__ = [
    "compact_indices",
    "fold_",
    "grad_weight_topk",
    "nonzero_rows_cols",
    "sparse_adam_",
    "sparse_dense_mm",
    "sparse_dense_mm_coo",
    "topk_coo",
]
