from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, INTERPRETING, assert_close_to, examples, orthogonal, strided_views
from sparsegrad_kernels.ops import fold_

OP = torch.ops.sparsegrad_kernels.fold_.default
SIDES = ("both", "in", "out", "none")  # which have a basis; that of the others is the identity


def make(out, in_, r_out, r_in, n, dtype, generator, sides="both"):
    weight = torch.randn(out, in_, generator=generator).to(dtype)
    u = orthogonal(in_, generator)[:r_in].to(dtype) if sides in ("both", "in") else None
    v = orthogonal(out, generator)[:r_out].to(dtype) if sides in ("both", "out") else None
    r_in, r_out = in_ if u is None else r_in, out if v is None else r_out
    # With replacement: entries given twice are summed.
    rows = torch.randint(r_out, (n,), generator=generator)
    cols = torch.randint(r_in, (n,), generator=generator)
    values = torch.randn(n, generator=generator).to(dtype)
    return weight, u, v, torch.stack([rows, cols]), values


def check(weight, u, v, indices, values, layout: str) -> None:
    u64 = torch.eye(weight.shape[1], dtype=torch.float64) if u is None else u.double()
    v64 = torch.eye(weight.shape[0], dtype=torch.float64) if v is None else v.double()
    d = torch.zeros(v64.shape[0], u64.shape[0], dtype=torch.float64)
    d.index_put_((indices[0], indices[1]), values.double(), accumulate=True)
    oracle = weight.double() + v64.T @ d @ u64
    scale = weight.double().abs() + v64.abs().T @ d.abs() @ u64.abs()
    if u is None and v is None:  # summed one by one in the weight's dtype
        scale = scale + values.double().abs().sum()
    target = strided_views(weight)[layout]
    fold_(target, u, v, indices, values)
    assert_close_to(target, oracle, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (12, 5, 12, 5), (5, 12, 3, 7), (30, 20, 30, 4)])
@pytest.mark.parametrize("n", [0, 40])
@pytest.mark.parametrize(
    ("layout", "sides"),
    [
        *((layout, "both") for layout in ("contiguous", "transposed", "sliced")),
        *(("sliced", sides) for sides in SIDES[1:]),
        *(("transposed", sides) for sides in SIDES[1:3]),
    ],
)
def test_equals_oracle(dtype, size, n, layout, sides, generator):
    weight, u, v, indices, values = make(*size, n, dtype, generator, sides)
    u, v = (None if factor is None else strided_views(factor)[layout] for factor in (u, v))
    check(weight, u, v, indices, values, layout)


@settings(max_examples=examples(60), deadline=None)
@given(
    out=st.integers(1, 24),
    in_=st.integers(1, 24),
    share=st.floats(0.05, 1),
    n=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    sides=st.sampled_from(SIDES),
    seed=st.integers(0, 2**31),
)
def test_property(out, in_, share, n, dtype, sides, seed):
    generator = torch.Generator().manual_seed(seed)
    r_out, r_in = max(1, int(share * out)), max(1, int(share * in_))
    check(*make(out, in_, r_out, r_in, n, dtype, generator, sides), "contiguous")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(131, 40, 17, 9), (40, 131, 9, 33), (24, 24, 24, 8)])
@pytest.mark.parametrize("sides", SIDES)
def test_entries_in_any_order(dtype, size, sides, generator):
    """More than the kernels take at a time, each element several times, some rows never."""
    weight, u, v, indices, values = make(*size, 300, dtype, generator, sides)
    indices[0] -= indices[0] % 3
    first, second = weight.clone(), weight.clone()
    fold_(first, u, v, indices, values)
    fold_(second, u, v, indices, values)
    assert torch.equal(first, second)
    check(weight, u, v, indices, values, "contiguous")


def test_entries_of_one_element_are_added_in_their_order(generator):
    indices = torch.randint(2, (2, 500), generator=generator)
    values = torch.randn(500, generator=generator) * 10 ** torch.randn(500, generator=generator)
    weight = torch.zeros(2, 2)
    fold_(weight, None, None, indices, values)
    expected = torch.zeros(2, 2)
    for row, col, value in zip(*indices.tolist(), values, strict=True):
        expected[row, col] += value
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("size", [(131, 40, 17, 9), (40, 131, 9, 33)])
@pytest.mark.parametrize("sides", SIDES[:3])
def test_rows_of_the_basis_without_entries_take_no_part(size, sides, generator):
    weight, u, v, indices, values = make(*size, 30, torch.float32, generator, sides)
    indices -= indices % 2
    expected = weight.clone()
    fold_(expected, u, v, indices, values)
    for basis, used in ((u, indices[1]), (v, indices[0])):
        if basis is None:
            continue
        absent = torch.ones(len(basis), dtype=torch.bool)
        absent[used] = False
        basis[absent] = torch.nan
    fold_(weight, u, v, indices, values)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", ["in", "out"])
def test_one_side_leaves_what_no_update_changes(dtype, sides, generator):
    """Rows (columns, of the output basis alone) of W without an entry are not touched."""
    weight, u, v, indices, values = make(70, 90, 70, 90, 40, dtype, generator, sides)
    weight[0, 0] = -0.0
    indices = indices - indices % 2 + 1
    copy = weight.clone()
    fold_(weight, u, v, indices, values)
    ahead = (slice(None, None, 2),) if sides == "in" else (slice(None), slice(None, None, 2))
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    bits = bits if weight.element_size() > 2 else torch.int16
    assert torch.equal(weight[ahead].contiguous().view(bits), copy[ahead].contiguous().view(bits))
    assert not torch.equal(weight, copy)


def test_does_not_write_the_basis(generator):
    weight, u, v, indices, values = make(8, 6, 8, 6, 9, torch.float32, generator)
    copies = [t.clone() for t in (u, v, indices, values)]
    fold_(weight, u, v, indices, values)
    for tensor, copy in zip((u, v, indices, values), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_bad_input():
    w, u, v = torch.zeros(3, 2), torch.eye(2), torch.eye(3)
    i, x = torch.tensor([[2], [1]]), torch.ones(1)
    with pytest.raises(ValueError, match=r"u must have 2 columns for weight \(3, 2\)"):
        fold_(w, torch.eye(3), None, i, x)
    with pytest.raises(ValueError, match=r"v must have 3 columns for weight \(3, 2\)"):
        fold_(w, u, torch.eye(4), i, x)
    with pytest.raises(TypeError, match="u must have the dtype of weight"):
        fold_(w, u.double(), v, i, x)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 2\) x \[0, 2\)"):
        fold_(w, u, v[:2], i, x)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 2\) x \[0, 2\)"):
        fold_(w, None, v[:2], i, x)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\) x \[0, 1\)"):
        fold_(w, u[:1], None, i, x)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\) x \[0, 2\)"):
        fold_(w, None, None, torch.tensor([[3], [0]]), x)
    assert (w == 0).all()


@pytest.mark.parametrize("sides", SIDES)
def test_opcheck(sides, generator):
    torch.library.opcheck(OP, make(8, 6, 5, 4, 9, torch.float32, generator, sides))


def test_compile(generator):
    weight, u, v, indices, values = make(8, 6, 5, 4, 9, torch.float32, generator)
    copy = weight.clone()

    def use(weight):
        fold_(weight, u, v, indices, values)
        return weight * 2

    torch.testing.assert_close(torch.compile(use, fullgraph=True)(weight), use(copy))
    torch.testing.assert_close(weight, copy)


# ---- Stochastic rounding ----

NARROW = (torch.bfloat16, torch.float16)
OP_STOCHASTIC = torch.ops.sparsegrad_kernels._fold_stochastic_.default


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor([number])


def spread(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of `dtype` of every magnitude, subnormal ones and the largest among them."""
    limits = torch.finfo(dtype)
    numbers = [1.0, 1.5, -2.0, 0.0, -0.0, 3e-6, -4e-5, limits.tiny, limits.smallest_normal / 4]
    return torch.tensor([[*numbers, limits.max, limits.min, torch.inf, torch.nan, 100.0]]).to(dtype)


def every_element(weight: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(weight).nonzero().T


def fold_all(weight: torch.Tensor, values: torch.Tensor, seed: int) -> torch.Tensor:
    """`weight + values`, one for each element, rounded stochastically."""
    result = weight.clone()
    fold_(result, None, None, every_element(weight), values, seed_of(seed))
    return result


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_stochastic_is_a_neighbour_of_the_sum(dtype, sides, layout, generator):
    weight, *factors, indices, values = make(9, 7, 9, 7, 30, dtype, generator, sides)
    exact = weight.double()  # not float32, which may be multiplied as tf32
    fold_(exact, *(f if f is None else f.double() for f in factors), indices, values.double())
    target = strided_views(weight.clone())[layout]
    fold_(target, *factors, indices, values, seed_of(5))
    gap = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert bool(((target.double() - exact).abs() <= 1.01 * gap).all())
    again, other = weight.clone(), weight.clone()
    fold_(again, *factors, indices, values, seed_of(5))
    fold_(other, *factors, indices, values, seed_of(6))
    assert torch.equal(again, target)
    assert not torch.equal(again, other)


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_is_unbiased(dtype):
    n, gap = 4000, torch.finfo(dtype).eps
    weight = torch.ones(40, n // 40, dtype=dtype)
    # 0.3 of the gap: rounded to nearest, it is lost.
    values = torch.full((n,), 0.3 * gap, dtype=dtype)
    seeds = range(2 if INTERPRETING else 8)
    up = torch.stack([fold_all(weight, values, seed) > 1 for seed in seeds]).double()
    assert bool(((up == 0) | (up == 1)).all())
    share = values[0].double().item() / gap
    error = (share * (1 - share) / up.numel()) ** 0.5
    assert abs(up.mean().item() - share) < 5 * error
    nearest = weight.clone()
    fold_(nearest, None, None, every_element(weight), values)
    assert torch.equal(nearest, weight)


def test_stochastic_is_unbiased_where_float16_is_subnormal():
    n, gap = 4000, 2.0**-24
    big = torch.full((n,), 3 * gap, dtype=torch.float16)
    weight = torch.full((40, n // 40), 0.25 * 2.0**-14, dtype=torch.float16)
    result = fold_all(weight, big, 1)  # representable: exact
    assert torch.equal(result, weight + big.view_as(weight))
    # 1 + 1 / 3 of a gap: the product of a basis row and a value that float16 cannot hold.
    u = torch.full((1, n // 40), 2.0**-12, dtype=torch.float16)
    v, value = torch.ones(1, 40, dtype=torch.float16), torch.tensor([2.0**-12 / 3]).half()
    wanted = 0.25 * 2.0**-14 + value.double().item() * 2.0**-12
    fold_(weight, u, v, torch.zeros(2, 1, dtype=torch.int64), value, seed_of(2))
    share = (wanted / gap) % 1
    error = gap * (share * (1 - share) / n) ** 0.5
    assert abs(weight.double().mean().item() - wanted) < 5 * error


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_leaves_what_no_update_changes(dtype):
    weight = spread(dtype)
    for values in (
        torch.zeros(weight.shape[1], dtype=dtype),
        -torch.zeros(weight.shape[1]).to(dtype),
    ):
        result = fold_all(weight, values, 3)
        assert torch.equal(result.view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_of_limits(dtype):
    limits = torch.finfo(dtype)
    weight = torch.tensor([[limits.max, limits.min, limits.max, torch.inf, 1.0, torch.inf]]).to(
        dtype
    )
    values = torch.tensor([limits.max * limits.eps / 16, -limits.max * limits.eps / 16])
    more = torch.tensor([limits.max, -torch.inf, torch.nan, 1.0])
    values = torch.cat([values, more]).to(dtype)
    for seed in range(20):
        result = fold_all(weight, values, seed)[0]
        assert result[0] == limits.max and result[1] == limits.min
        assert result[2] == torch.inf and result[3].isnan() and result[4].isnan()
        assert result[5] == torch.inf


def test_stochastic_bits_are_pinned():
    """The same on every backend: Philox 4x32-10 of the seed and the position."""
    gap = torch.finfo(torch.bfloat16).eps
    weight = torch.ones(1, 16, dtype=torch.bfloat16)
    values = torch.full((16,), 0.5 * gap).bfloat16()
    up = (fold_all(weight, values, 2**40 + 1)[0] > 1).int().tolist()
    assert up == [1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0]


def test_stochastic_bad_input():
    w, i, x = torch.zeros(3, 2).bfloat16(), torch.tensor([[2], [1]]), torch.ones(1).bfloat16()
    with pytest.raises(TypeError, match="weight must be bfloat16 or float16 to be rounded, got"):
        fold_(w.float(), None, None, i, x.float(), seed_of(1))
    with pytest.raises(TypeError, match="seed must be a torch.Tensor, got int"):
        fold_(w, None, None, i, x, 1)
    with pytest.raises(TypeError, match="seed must be int64, got torch.int32"):
        fold_(w, None, None, i, x, seed_of(1).int())
    with pytest.raises(ValueError, match="seed must have one element, got shape"):
        fold_(w, None, None, i, x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="seed must be on the device of weight, cpu, got meta"):
        fold_(w, None, None, i, x, seed_of(1).to("meta"))
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 3\) x \[0, 2\)"):
        fold_(w, None, None, torch.tensor([[3], [0]]), x, seed_of(1))


@pytest.mark.parametrize("sides", SIDES)
def test_stochastic_opcheck(sides, generator):
    arguments = make(8, 6, 5, 4, 9, torch.bfloat16, generator, sides)
    torch.library.opcheck(OP_STOCHASTIC, (*arguments, seed_of(1)))
