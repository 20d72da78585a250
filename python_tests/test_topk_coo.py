from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, INTERPRETING, SHAPES, examples, oracle_topk, strided_views
from sparsegrad_kernels.ops import topk_coo
from sparsegrad_kernels.ops.topk_coo import SLACK

OP = torch.ops.sparsegrad_kernels.topk_coo.default
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3.4e38, torch.inf, -torch.inf, torch.nan]


def check(c: torch.Tensor, k: int, view: torch.Tensor | None = None) -> None:
    indices, values = topk_coo(c if view is None else view, k)
    wanted_indices, wanted_values = oracle_topk(c, k)
    assert indices.dtype == torch.int64
    assert values.dtype == c.dtype
    assert torch.equal(indices, wanted_indices)
    # NaN equals NaN here, and -0.0 is not 0.0.
    assert torch.equal(values.isnan(), wanted_values.isnan())
    assert torch.equal(values.nan_to_num(), wanted_values.nan_to_num())
    assert torch.equal(values.signbit() | values.isnan(), wanted_values.signbit() | values.isnan())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 10**6])
def test_equals_oracle(shape, dtype, k, generator):
    c = torch.randn(*shape, generator=generator).to(dtype)
    for view in strided_views(c).values():
        check(c, k, view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_lowest_index(dtype, generator):
    c = torch.randint(-2, 3, (31, 23), generator=generator).to(dtype)
    for k in (1, 50, 300, 712, 713):
        check(c, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, generator):
    chosen = torch.randint(len(SPECIAL), (17, 19), generator=generator)
    c = torch.tensor(SPECIAL, dtype=torch.float64)[chosen].to(dtype)
    for k in (1, 20, 100, 200, 323):
        check(c, k)


# Triton's kernels do not read the threshold.
SHARES = [1.0] if INTERPRETING else [torch.nan, -1.0, 0.0, 0.5, 1.0, 1.5, 1e6, torch.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
def test_threshold_decides_nothing(dtype, share, generator):
    c = torch.randn(37, 41, generator=generator).to(dtype)
    for k in (1, 30, 2000):
        wanted = topk_coo(c, k)
        least = wanted[1].abs().amin().float()[None]
        threshold = share * least
        for got, right in zip(topk_coo(c, k, threshold), wanted, strict=True):
            assert torch.equal(got, right)
        torch.testing.assert_close(threshold, SLACK * least)


def test_bad_thresholds_are_named(generator):
    c = torch.randn(3, 4, generator=generator)
    with pytest.raises(TypeError, match="threshold must be float32"):
        topk_coo(c, 2, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="threshold must have shape"):
        topk_coo(c, 2, torch.zeros(2))


def test_all_nans_are_equal():
    payloads = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    c = torch.cat([torch.tensor([torch.inf]), payloads.view(torch.float32)])[None]
    assert topk_coo(c, 2)[0].tolist() == [[0, 0], [1, 2]]


@settings(max_examples=examples(200), deadline=None)
@given(
    rows=st.integers(0, 30),
    cols=st.integers(0, 30),
    k=st.integers(1, 1000),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-44, 1e-8, 1.0, 1e30]),
    levels=st.sampled_from([3, 1000]),
    seed=st.integers(0, 2**31),
)
def test_property(rows, cols, k, dtype, scale, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(-levels, levels + 1, (rows, cols), generator=generator).double() * scale
    check(c.to(dtype), k)


def kinds(dtype: torch.dtype, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Matrices `[21, 150]` that mislead a sample, or leave it nothing to tell apart."""
    c = torch.randn(21, 150, generator=generator, dtype=torch.float64)
    few = c * (torch.rand(21, 150, generator=generator) < 0.01)
    corner = torch.zeros_like(c)
    corner[:4, :40] = c[:4, :40].exp()
    cases = {"normal": c, "far apart": (40 * c).exp(), "equal": torch.full_like(c, 1.37)}
    cases |= {"few": few, "corner": corner, "NaN": c * torch.nan}
    return {name: case.to(dtype) for name, case in cases.items()}


@pytest.mark.skipif(not INTERPRETING, reason="of the Triton kernels, in their interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampled", ["fitting", "too high", "no room"])
def test_sample_never_decides(dtype, sampled, generator, monkeypatch):
    from sparsegrad_kernels._triton import topk_coo as kernels

    monkeypatch.setattr(kernels, "SAMPLE_SIZE", 512)
    if sampled == "too high":
        plan = kernels.sample_plan
        monkeypatch.setattr(kernels, "sample_plan", lambda numel, k: (*plan(numel, k)[:2], 1))
    if sampled == "no room":
        monkeypatch.setattr(kernels, "room", lambda numel, k: 60)
    for i, c in enumerate(kinds(dtype, generator).values()):
        views = list(strided_views(c).values())
        check(c, 300, views[i % len(views)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_both_sides_of_the_cache(dtype):
    """The CUDA kernels are one launch where the L2 cache has room for the matrix, else several."""
    cols, cache = 4096, torch.cuda.get_device_properties(0).L2_cache_size
    rows = cache // (cols * dtype.itemsize)
    generator = torch.Generator("cuda").manual_seed(0)
    c = torch.randn(rows, cols, device="cuda", generator=generator).to(dtype)
    for part in (c, c[: rows // 4]):
        for view in (part, part[:, 1:], part.T):
            k = view.numel() // 500
            ranking = view.abs().flatten().argsort(descending=True, stable=True)
            order = ranking[:k].sort().values
            indices, values = topk_coo(view, k)
            assert torch.equal(indices[0] * view.shape[1] + indices[1], order)
            assert torch.equal(values, view.flatten()[order])


def test_coalesced_as_it_stands(generator):
    c = torch.randn(40, 30, generator=generator)
    indices, values = topk_coo(c, 100)
    sparse = torch.sparse_coo_tensor(indices, values, c.shape, check_invariants=True)
    coalesced = sparse.coalesce()
    assert torch.equal(coalesced.indices(), indices)
    assert torch.equal(coalesced.values(), values)


def test_bad_input():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        topk_coo(torch.zeros(2, 2), 0)
    with pytest.raises(TypeError, match="k must be an int, got float"):
        topk_coo(torch.zeros(2, 2), 1.0)
    with pytest.raises(ValueError, match=r"c must have 2 dimensions, got shape \(4,\)"):
        topk_coo(torch.zeros(4), 1)
    with pytest.raises(TypeError, match=r"c must be float32.* got torch.complex64"):
        topk_coo(torch.zeros(2, 2, dtype=torch.complex64), 1)


@pytest.mark.parametrize("k", [3, 100])
def test_opcheck(k, generator):
    torch.library.opcheck(OP, (torch.randn(6, 7, generator=generator), k))


def test_compile(generator):
    c = torch.randn(6, 7, generator=generator)

    def use(c):
        indices, values = topk_coo(c, 5)
        return indices + 1, values * 2

    for got, wanted in zip(torch.compile(use, fullgraph=True)(c), use(c), strict=True):
        assert torch.equal(got, wanted)
