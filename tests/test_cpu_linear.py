"""The C++ linear_stats and multi_sq_norm against the reference on the same inputs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import num_threads
from torch import Tensor

from gradstats import reference

C = pytest.importorskip("gradstats._C", reason="gradstats._C is not built")

NAMES = ("dw", "db", "w_sq_norm", "b_sq_norm", "w_m2", "b_m2")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Relative to the value for norms, to the largest element for gradients and moments.
NORM_TOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-3}
GRAD_TOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 8e-3}
SHAPES = [  # B, T, I, O, and the path that norms take; 16-bit numbers are fused where it is long
    pytest.param(5, 1, 17, 33, id="rank-one"),
    pytest.param(1500, 1, 40, 25, id="rank-one-many-groups"),
    # Moments on matrix tiles, where the CPU has them.
    pytest.param(33, 1, 65, 70, id="rank-one-tiles-odd"),
    pytest.param(700, 1, 129, 257, id="rank-one-tiles-deep"),
    pytest.param(64, 1, 64, 96, id="rank-one-tiles-full"),
    pytest.param(9, 1, 20, 1030, id="rank-one-parts"),
    pytest.param(6, 3, 65, 70, id="gram-odd"),
    pytest.param(130, 9, 128, 96, id="gram-many-groups"),
    pytest.param(6, 12, 42, 31, id="fused-short"),
    pytest.param(4, 64, 31, 30, id="long-odd"),
    pytest.param(3, 200, 129, 257, id="long-wide"),
    pytest.param(2, 1101, 50, 3, id="long-narrow"),
    pytest.param(70, 40, 33, 1, id="long-many-groups"),
    pytest.param(3, 36, 1300, 210, id="long-blocks-of-columns"),
    pytest.param(9, 5, 1, 1, id="one-by-one"),
    pytest.param(1, 7, 300, 10, id="single-sample"),
    pytest.param(1, 1, 8, 8, id="single-row"),
]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def check(x: Tensor, g: Tensor, weight: bool, bias: bool, moments: bool) -> tuple[Tensor, ...]:
    got = C.linear_stats(x, g, weight, bias, moments)
    with num_threads(1):  # many small products: threads only get in each other's way
        want = reference.linear_stats(x.double(), g.double(), weight, bias, moments)
    wide = reference.stats_dtype(x.dtype)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == (x.dtype if name in ("dw", "db") else wide), name
        if a.numel() == 0:
            continue
        assert torch.isfinite(a).all(), name
        if name.endswith("sq_norm"):
            torch.testing.assert_close(
                a.double(), b, rtol=NORM_TOL[x.dtype], atol=1e-30, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            rounded = name in ("dw", "db")  # moments are never rounded to the inputs' dtype
            tol = GRAD_TOL[x.dtype if rounded else wide] * b.abs().max().item()
            assert (a.double() - b).abs().max() <= tol + 1e-30, name
        if name.endswith("m2"):
            assert (a >= 0).all(), name
    return got


@pytest.mark.parametrize("moments", [False, True], ids=["norms", "moments"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "t", "i", "o"), SHAPES)
def test_matches_reference(
    b: int, t: int, i: int, o: int, dtype: torch.dtype, moments: bool
) -> None:
    got = check(rand(b, t, i, dtype=dtype), rand(b, t, o, dtype=dtype), True, True, moments)
    if b == 1 and moments:
        assert (got[4] == 0).all()
        assert (got[5] == 0).all()


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_only_what_was_asked_for(weight: bool, bias: bool, moments: bool) -> None:
    check(rand(4, 20, 24), rand(4, 20, 40), weight, bias, moments)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_dimensions(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, t, i, o = shape
    check(rand(b, t, i, dtype=dtype), rand(b, t, o, dtype=dtype), True, True, True)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("t", [1, 4, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(t: int, dtype: torch.dtype, moments: bool) -> None:
    b, i, o = 5, 70, 90
    x, g = rand(b, t, i, dtype=dtype), rand(b, t, o, dtype=dtype)
    ones = torch.ones((), dtype=dtype)
    for xs in (
        rand(b, t, 2 * i, dtype=dtype)[..., ::2],
        rand(b, t, i + 3, dtype=dtype)[..., 1 : i + 1],
        rand(b, i, t, dtype=dtype).transpose(1, 2),
        rand(t, b, i, dtype=dtype).transpose(0, 1),
        rand(2 * b, t, i, dtype=dtype)[::2],
        rand(b, 1, i, dtype=dtype).expand(b, t, i),
        rand(i, dtype=dtype).expand(b, t, i),
    ):
        check(xs, g, True, True, moments)
    for gs in (
        ones.expand(b, t, o),  # out.sum().backward()
        rand(1, t, o, dtype=dtype).expand(b, t, o),
        rand(b, o, t, dtype=dtype).transpose(1, 2),
        rand(t, b, o, dtype=dtype).transpose(0, 1),
    ):
        check(x, gs, True, True, moments)


@pytest.mark.parametrize("t", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_nearly_identical_samples(dtype: torch.dtype, t: int) -> None:
    """m2 is 1e-6 of the sum of squares here; the difference of two large numbers would lose it."""
    b, i, o = 12, 40, 50
    x = rand(1, t, i, dtype=dtype).expand(b, t, i)
    g = rand(1, t, o, dtype=dtype) + 1e-3 * rand(b, t, o, dtype=dtype)
    m2 = C.linear_stats(x, g, True, False, True)[4]
    want = reference.linear_stats(x.double(), g.double(), True, False, True)[4]
    tol = 2e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(m2.double(), want, rtol=tol, atol=tol * want.mean().item())


def test_moments_where_some_outputs_agree() -> None:
    """At T = 1 only the rows that lose digits are computed again; the others keep theirs."""
    x, g = rand(40, 1, 70), rand(40, 1, 90)
    x[..., 0] = 1.0
    g[..., 3:5] = 2.0 + 1e-4 * g[..., 3:5]
    g[..., 89] = -1.0
    want = reference.linear_stats(x.double(), g.double(), True, False, True)[4]
    m2 = C.linear_stats(x, g, True, False, True)[4]
    torch.testing.assert_close(m2.double(), want, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("scales", [(1e-13, 1e5), (1e14, 1e-16), (1e-25, 1.0), (1e-10, 1e-9)])
def test_moments_of_any_magnitude(scales: tuple[float, float]) -> None:
    """Each element to 1e-4 of itself, where the squares are far from one and unlike."""
    x, g = rand(96, 1, 80) * scales[0], rand(96, 1, 72) * scales[1]
    g[:, :, ::7] *= 1e-6
    m2 = C.linear_stats(x, g, True, False, True)[4]
    xd, gd = x[:, 0].double(), g[:, 0].double()
    want = gd.square().t() @ xd.square() - (gd.t() @ xd).square() / 96
    smallest = float(torch.finfo(torch.float32).tiny)  # below it digits are lost anyway
    ok = (m2.double() - want).abs() <= 1e-4 * want + smallest
    assert ok.all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_moments_of_numbers_that_are_not_finite(bad: float) -> None:
    x, g = rand(64, 1, 80), rand(64, 1, 72)
    x[5, 0, 3] = bad
    m2 = C.linear_stats(x, g, True, False, True)[4]
    assert not torch.isfinite(m2[:, 3]).any()
    assert torch.isfinite(m2[:, :3]).all()
    zero = C.linear_stats(torch.zeros(64, 1, 80), g, True, False, True)[4]
    assert (zero == 0).all()


@pytest.mark.parametrize("t", [1, 64])
def test_moments_of_identical_samples_are_not_negative(t: int) -> None:
    x, g = rand(1, t, 33).expand(50, t, 33), rand(1, t, 17).expand(50, t, 17)
    assert (C.linear_stats(x, g, True, True, True)[4] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_that_cancel(dtype: torch.dtype) -> None:
    """Short samples whose positions cancel leave the Gram path, which would lose the digits."""
    b, t, i, o = 6, 8, 256, 256
    x = rand(b, 1, i, dtype=dtype).expand(b, t, i).clone()
    g = rand(b, t, o, dtype=dtype)
    g[:, 1::2] = -g[:, ::2]
    x[:, 0] *= 1 + 2**-6
    check(x, g, True, True, False)


@pytest.mark.parametrize("t", [1, 6, 100])
@pytest.mark.parametrize("moments", [False, True])
def test_bit_reproducible_for_any_number_of_threads(t: int, moments: bool) -> None:
    x, g = rand(40, t, 200), rand(40, t, 150)
    runs = []
    for n in (1, 2, 3, 2):
        with num_threads(n):
            runs.append(C.linear_stats(x, g, True, True, moments))
    for run in runs[1:]:
        for name, a, b in zip(NAMES, runs[0], run, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "i", "o"),
    [(7, 1, 45, 37), (7, 3, 45, 37), (7, 50, 45, 37), (40, 60, 45, 37), (40, 1, 75, 67)],
)
def test_unset_memory_is_not_read(b: int, t: int, i: int, o: int, moments: bool) -> None:
    """Every buffer is written before it is read, padding included."""
    x, g = rand(b, t, i), rand(b, t, o)
    want = C.linear_stats(x, g, True, True, moments)
    for elements in (o, i * o, b * t * 64, b * t * 38, 1 << 16):
        poison = [torch.full((elements,), torch.nan) for _ in range(8)]
        del poison
        for name, a, c in zip(NAMES, C.linear_stats(x, g, True, True, moments), want, strict=True):
            assert torch.equal(a, c), name


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(0, 40),
    st.integers(0, 80),
    st.integers(0, 80),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(
    b: int, t: int, i: int, o: int, dtype: torch.dtype, weight: bool, bias: bool, moments: bool
) -> None:
    # All of one sign: a 1 x 1 gradient that happens to cancel to nearly zero has no relative accuracy.
    x, g = rand(b, t, i, dtype=dtype).abs(), rand(b, t, o, dtype=dtype, seed=1).abs()
    check(x, g, weight, bias, moments)


@pytest.mark.parametrize(
    ("x", "g", "message"),
    [
        (rand(2, 3), rand(2, 3, 4), r"x must be \(B, T, I\), got shape \[2, 3\]"),
        (rand(2, 3, 4), rand(2, 3), r"g must be \(B, T, O\), got shape \[2, 3\]"),
        (rand(2, 3, 4), rand(2, 5, 4), r"g must have the \(B, T\) of x.*\[2, 3, 4\].*\[2, 5, 4\]"),
        (rand(2, 3, 4), rand(2, 3, 4).double(), "g must have the dtype of x"),
        (rand(2, 3, 4).half(), rand(2, 3, 4).half(), "x must be float32, float64 or bfloat16"),
        (rand(2, 3, 4).to("meta"), rand(2, 3, 4), "x must be on the CPU"),
    ],
)
def test_errors_name_the_argument(x: Tensor, g: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"linear_stats: {message}"):
        C.linear_stats(x, g, True, True, True)


def test_multi_sq_norm() -> None:
    tensors = [
        rand(3, 5),
        rand(100_003),
        rand(64, 65).t(),
        rand(30, 40)[::2, ::3],
        rand(7).expand(9, 7),
        rand(1),
        torch.zeros(0),
        torch.tensor(3.0),
        rand(1001, dtype=torch.float64),
        rand(70_001, dtype=torch.bfloat16),
        rand(513, dtype=torch.float16),
    ]
    got = C.multi_sq_norm(tensors)
    assert got.dtype == torch.float32
    want = torch.stack([t.double().square().sum() for t in tensors])
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert torch.equal(got, C.multi_sq_norm(tensors))


def test_multi_sq_norm_dtype_and_length() -> None:
    doubles = C.multi_sq_norm([rand(10, dtype=torch.float64)] * 3)
    assert doubles.dtype == torch.float64
    want = reference.multi_sq_norm([rand(10, dtype=torch.float64)] * 3)
    torch.testing.assert_close(doubles, want, rtol=1e-14, atol=0)
    assert C.multi_sq_norm([]).shape == (0,)
    many = [rand(n % 50) for n in range(3000)]
    torch.testing.assert_close(C.multi_sq_norm(many), reference.multi_sq_norm(many))


def test_multi_sq_norm_errors_name_the_tensor() -> None:
    with pytest.raises(RuntimeError, match=r"multi_sq_norm: tensors\[1\] must be float32"):
        C.multi_sq_norm([rand(2), torch.ones(2, dtype=torch.int64)])
