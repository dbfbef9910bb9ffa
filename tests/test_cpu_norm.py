"""LayerNorm, RMSNorm and GroupNorm statistics of the compiled CPU backend against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import num_threads
from torch import Tensor

from gradstats import reference

C = pytest.importorskip("gradstats._C")

REL = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float64: 1e-12}
NAMES = ("dx", "dw", "db", "w_sq_norm", "b_sq_norm", "w_m2", "b_m2")
FLAGS = pytest.mark.parametrize(
    "flags", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (1, 0, 0, 0)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def m2_of_equal(sums: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """The most that rounding leaves in m2 of equal samples v = sums/samples, in any number of threads.

    To first order in u = eps/2: a running sum of k of them is off by at most u|v|(k² + k)/2, and so the
    mean made of it, with two more roundings, by u|v|(k + 5)/2, as is the next sample's distance from it.
    Samples in several threads have shorter sums, and their merging adds no longer ones.
    """
    u = torch.finfo(dtype).eps / 2
    squares = sum(((k + 5) / 2) ** 2 for k in range(1, samples + 1))
    return squares * (u * sums / max(1, samples)) ** 2


def check(got: tuple[Tensor, ...], inputs: tuple, op, dtype: torch.dtype) -> None:
    """`got` against the reference on the same inputs in float64; `inputs` starts with tensors."""
    wide = [a.double() if isinstance(a, Tensor) else a for a in inputs]
    expected = op(*wide)
    # dx is a difference, and so as exact as its terms, which are of the size of g·scale·rstd.
    g, _, _, rstd, scale = wide[:5]
    sizes = [t.abs().max() for t in (g, rstd, scale) if t is not None and t.numel()]
    terms = torch.stack(sizes).prod() if sizes else torch.zeros(())
    for name, a, e in zip(NAMES, got, expected, strict=True):
        assert a.shape == e.shape, name
        rounded = name in ("dx", "dw", "db")  # kept in the inputs' dtype
        stats = torch.float64 if dtype == torch.float64 else torch.float32
        assert a.dtype == (dtype if rounded else stats), name
        if not a.numel():
            continue
        assert torch.isfinite(a).all(), name
        if name.endswith("sq_norm"):
            torch.testing.assert_close(a.double(), e, rtol=REL[dtype], atol=1e-30, msg=name)
        else:
            rel = 8e-3 if rounded and dtype == torch.bfloat16 else 2 * REL[dtype]
            size = e.abs().max() if name != "dx" else terms
            floor = torch.full_like(e, 1e-30)
            if name.endswith("m2"):
                sums = expected[1 if name == "w_m2" else 2].double()
                floor += m2_of_equal(sums, len(g), stats) if sums.numel() else 0
            assert ((a.double() - e).abs() <= rel * size + floor).all(), name
        if name.endswith("m2"):
            assert (a >= 0).all(), name


def layer_case(
    b: int, t: int, d: int, dtype: torch.dtype, center: bool, scale: bool, seed: int = 0
) -> tuple[Tensor | None, ...]:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    x, g = draw(b, t, d), draw(b, t, d)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    wide = x.to(stats)
    mean = wide.mean(-1) if center else None
    off = wide - mean.unsqueeze(-1) if mean is not None else wide
    rstd = (off.square().mean(-1) + 1e-5).rsqrt()
    return g, x, mean, rstd, draw(d) if scale else None


def layer(case: tuple, *flags: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    got = C.layer_norm_stats(*case, *flags)
    check(got, (*case, *flags), reference.layer_norm_stats, dtype)
    return got


@DTYPES
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 1, 64), (1, 300, 33), (2, 700, 16), (9, 3, 129)])
def test_layer_norm(shape: tuple[int, int, int], center: bool, dtype: torch.dtype) -> None:
    case = layer_case(*shape, dtype, center, True)
    layer(case, True, True, True, True, dtype=dtype)


@FLAGS
@pytest.mark.parametrize("scale", [True, False])
def test_layer_norm_gives_what_was_asked_for(flags: tuple[int, ...], scale: bool) -> None:
    case = layer_case(3, 6, 20, torch.float32, True, scale)
    layer(case, *(bool(f) for f in flags), dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 6), st.integers(0, 70), st.integers(1, 70), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_layer_norm_any_shape(b: int, t: int, d: int, center: bool, scale: bool, seed: int) -> None:
    case = layer_case(b, t, d, torch.float64, center, scale, seed)
    layer(case, True, True, True, True, dtype=torch.float64)


def test_layer_norm_any_strides() -> None:
    g, x, mean, rstd, scale = layer_case(4, 6, 10, torch.float32, True, True)
    flags = (True, True, True, True)
    ones = torch.ones(()).expand(4, 6, 10)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    cut = torch.randn(4, 6, 25)[..., 3:23:2]
    for gv in (ones, cut, g):
        for xv in (turned, columns, x):
            layer((gv, xv, mean, rstd, scale), *flags, dtype=torch.float32)
    shared = (g, x[:1].expand(4, 6, 10), mean[:1].expand(4, 6), rstd[:1].expand(4, 6), scale)
    layer(shared, *flags, dtype=torch.float32)


def test_layer_norm_mixed_dtypes() -> None:
    g, x, mean, rstd, _ = layer_case(3, 4, 24, torch.bfloat16, True, False)
    scale = torch.randn(24)
    got = C.layer_norm_stats(g, x, mean, rstd, scale, True, True, True, False)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == got[2].dtype == torch.float32


def group_case(
    b: int, c: int, s: int, groups: int, dtype: torch.dtype, scale: bool, seed: int = 0
) -> tuple[Tensor | None, ...]:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    x, g = draw(b, c, s), draw(b, c, s)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    flat = x.to(stats).reshape(b, groups, c // groups * s)
    mean = flat.mean(-1)
    rstd = (flat.var(-1, unbiased=False) + 1e-5).rsqrt()
    return g, x, mean, rstd, draw(c) if scale else None


def group(case: tuple, *flags: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    got = C.group_norm_stats(*case, *flags)
    check(got, (*case, *flags), reference.group_norm_stats, dtype)
    return got


@DTYPES
@pytest.mark.parametrize(
    "shape", [(3, 6, 35, 3), (1, 8, 9000, 2), (5, 4, 1, 1), (2, 5, 17, 5), (7, 12, 49, 1)]
)
def test_group_norm(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    group(group_case(*shape, dtype, True), True, True, True, True, dtype=dtype)


@FLAGS
@pytest.mark.parametrize("scale", [True, False])
def test_group_norm_gives_what_was_asked_for(flags: tuple[int, ...], scale: bool) -> None:
    case = group_case(3, 6, 20, 2, torch.float32, scale)
    group(case, *(bool(f) for f in flags), dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 70), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_group_norm_any_shape(
    b: int, groups: int, width: int, s: int, scale: bool, seed: int
) -> None:
    case = group_case(b, groups * width, s, groups, torch.float64, scale, seed)
    group(case, True, True, True, True, dtype=torch.float64)


def test_group_norm_of_no_samples() -> None:
    case = (torch.ones(0, 6, 5), torch.ones(0, 6, 5), torch.ones(0, 2), torch.ones(0, 2), None)
    dx, dw, db, *stats = C.group_norm_stats(*case, True, True, True, True)
    assert dx.shape == (0, 6, 5)
    assert not dw.any()
    assert not db.any()
    assert [t.shape for t in stats] == [(0,), (0,), (6,), (6,)]
    assert not stats[2].any()


def test_group_norm_any_strides() -> None:
    g, x, mean, rstd, scale = group_case(4, 6, 15, 3, torch.float32, True)
    last = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels last
    for gv in (torch.ones(()).expand(4, 6, 15), g.transpose(0, 1).contiguous().transpose(0, 1)):
        group((gv, last, mean, rstd, scale), True, True, True, True, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_nearly_identical_samples(kind: str) -> None:
    """m2 is a difference of almost equal numbers only where it is computed as one."""
    if kind == "layer":
        g, x, mean, rstd, scale = layer_case(1, 4, 32, torch.float32, True, True)
        op, run = reference.layer_norm_stats, C.layer_norm_stats
    else:
        g, x, mean, rstd, scale = group_case(1, 8, 20, 2, torch.float32, True)
        op, run = reference.group_norm_stats, C.group_norm_stats
    n = 64
    torch.manual_seed(0)
    gs = g.expand(n, -1, -1) + 1e-3 * torch.randn(n, *g.shape[1:])
    case = (gs, x.expand(n, -1, -1), mean.expand(n, -1), rstd.expand(n, -1), scale)
    flags = (False, True, True, True)
    got = run(*case, *flags)
    expected = op(*(a.double() for a in case), *flags)
    for a, e in zip(got[5:], expected[5:], strict=True):
        assert (a >= 0).all()
        torch.testing.assert_close(a.double(), e, rtol=1e-2, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("samples", [3, 7, 64, 333])
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_equal_samples(kind: str, samples: int, threads: int) -> None:
    """Their m2 is that of their mean's last digits."""
    if kind == "layer":
        g, x, mean, rstd, scale = layer_case(1, 5, 33, torch.float32, True, True)
        run = C.layer_norm_stats
    else:
        g, x, mean, rstd, scale = group_case(1, 8, 20, 2, torch.float32, True)
        run = C.group_norm_stats
    case = [t.expand(samples, *t.shape[1:]) for t in (g, x, mean, rstd)]
    with num_threads(threads):
        _, dw, db, _, _, w_m2, b_m2 = run(*case, scale, False, True, True, True)
    for sums, m2 in ((dw, w_m2), (db, b_m2)):
        assert (m2 >= 0).all()
        assert (m2.double() <= m2_of_equal(sums.double(), samples, torch.float32)).all()


def test_bit_reproducible() -> None:
    flags = (True, True, True, True)
    a = layer_case(5, 333, 65, torch.float32, True, True)
    b = group_case(5, 16, 77, 4, torch.float32, True)
    first = [*C.layer_norm_stats(*a, *flags), *C.group_norm_stats(*b, *flags)]
    for _ in range(5):
        again = [*C.layer_norm_stats(*a, *flags), *C.group_norm_stats(*b, *flags)]
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_one_thread_agrees() -> None:
    case = layer_case(5, 333, 65, torch.float32, True, True)
    with num_threads(1):
        layer(case, True, True, True, True, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(3, 4, 5)}, r"g must have the shape.*\[3, 4, 5\]"),
        ({1: torch.randn(3, 24)}, r"x must be \(B, T, D\).*\[3, 24\]"),
        ({2: torch.randn(3, 5)}, r"mean must be \(B, T\).*\[3, 5\]"),
        ({3: torch.randn(4, 3)}, r"rstd must be \(B, T\).*\[4, 3\]"),
        ({4: torch.randn(7)}, r"scale must be \(D,\).*\[7\]"),
    ],
)
def test_layer_norm_refuses(change: dict[int, Tensor], message: str) -> None:
    case = list(layer_case(3, 4, 6, torch.float32, True, True))
    for k, v in change.items():
        case[k] = v
    with pytest.raises(RuntimeError, match=message):
        C.layer_norm_stats(*case, True, True, True, True)


def test_group_norm_refuses() -> None:
    g, x, mean, rstd, scale = group_case(3, 6, 5, 2, torch.float32, True)
    with pytest.raises(RuntimeError, match=r"mean must be \(B, groups\).*\[3, 4\]"):
        C.group_norm_stats(g, x, torch.ones(3, 4), rstd, scale, True, True, True, True)
    with pytest.raises(RuntimeError, match="float32, float64 or bfloat16"):
        C.group_norm_stats(g.half(), x.half(), mean, rstd, scale, True, True, True, True)
