"""`csrc/select.h`, which the CUDA kernels select by, run on the CPU against the reference."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cases import DTYPES
from sparsegrad_kernels.ops.topk_coo import _BITS, _reference

SOURCE = Path(__file__).with_name("select_host.cpp")
COMPILER = shutil.which("c++")
C_INTS = {16: ctypes.c_int16, 32: ctypes.c_int32, 64: ctypes.c_int64}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None or not (SOURCE.parents[1] / "csrc" / "select.h").exists():
        pytest.skip("needs a C++ compiler and the sources")
    target = tmp_path_factory.mktemp("select") / "select.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def matrices(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 3000, generator=generator).to(dtype)
    specials = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny / 4]
    pool = torch.tensor(specials, dtype=torch.float64).to(dtype)
    ties = pool[torch.randint(len(pool), (1, 1000), generator=generator)]
    bits = _BITS.get(dtype, torch.int16)
    any_bits = torch.randint(-(2**62), 2**62, (1, 1000), generator=generator).to(bits).view(dtype)
    return [normal, ties, any_bits, torch.zeros(1, 100, dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_selects_as_the_reference(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = _BITS.get(dtype, torch.int16)
    integer = C_INTS[torch.iinfo(bits).bits]
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(bits).item())
    function = library[f"select{torch.iinfo(bits).bits}"]
    for matrix in matrices(dtype):
        n = matrix.numel()
        for k in (1, 2, n // 3, n - 1, n):
            for part in (1, 64, n):
                out = torch.full((k,), -1)
                function(
                    ctypes.c_void_p(matrix.data_ptr()),
                    ctypes.c_int64(n),
                    ctypes.c_int64(k),
                    integer(infinity),
                    ctypes.c_int64(part),
                    ctypes.c_void_p(out.data_ptr()),
                )
                assert torch.equal(out, _reference(matrix, k)[0][1])
