"""SparseGrad (EMNLP 2024): fine-tune MLP layers with about 1% of the weight gradient."""

from . import ops
from ._backends import Backend, backends
from ._version import __version__
from .basis import Basis, fit_basis
from .config import SparseGradConfig
from .distributed import sync_sparse_gradients
from .linear import SparseGradLinear
from .model import convert, load, merge, save
from .optim import SparseAdam

__all__ = [
    "Backend",
    "Basis",
    "SparseAdam",
    "SparseGradConfig",
    "SparseGradLinear",
    "__version__",
    "backends",
    "convert",
    "fit_basis",
    "load",
    "merge",
    "ops",
    "save",
    "sync_sparse_gradients",
]
