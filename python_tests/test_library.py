from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsegrad_kernels import ops
from sparsegrad_kernels.ops._library import without_autocast

ALLOW_TF32 = torch.ops.sparsegrad_kernels._allow_tf32.default
matmul = torch.backends.cuda.matmul


def set_allow_tf32(on: bool) -> None:
    matmul.allow_tf32 = on


def set_fp32_precision(on: bool) -> None:
    matmul.fp32_precision = "tf32" if on else "ieee"


def set_float32_matmul_precision(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")


def set_for_all_backends(on: bool) -> None:
    matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32" if on else "ieee"


@pytest.fixture
def flags() -> Iterator[None]:
    matmul_precision, every = matmul.fp32_precision, torch.backends.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = every
    matmul.fp32_precision = matmul_precision


@pytest.mark.parametrize(
    "let",
    [
        set_allow_tf32,
        set_fp32_precision,
        set_float32_matmul_precision,
        set_for_all_backends,
    ],
)
def test_tf32_is_allowed_where_torch_allows_it(let, flags):
    for on in (True, False, True):
        let(on)
        assert ALLOW_TF32() is on


def test_tf32_flag_is_read_in_any_thread_and_mode(flags):
    with ThreadPoolExecutor(1) as other:
        for on in (True, False):
            set_allow_tf32(on)
            assert other.submit(ALLOW_TF32).result() is on
            with FakeTensorMode(), torch.inference_mode():
                assert ALLOW_TF32() is on


def test_operators_leave_autocast_as_it_was(generator):
    c = torch.randn(4, 5, generator=generator)
    for enabled in (True, False):
        with torch.autocast("cpu", enabled=enabled):
            assert without_autocast("cpu", torch.matmul, c, c.T).dtype == torch.float32
            ops.topk_coo(c, 3)
            with pytest.raises(RuntimeError):
                without_autocast("cpu", torch.matmul, c, c)
            assert torch.is_autocast_enabled("cpu") == enabled
    assert not torch.is_autocast_enabled("cpu")
