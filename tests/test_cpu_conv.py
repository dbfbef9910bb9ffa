"""Convolution statistics of the compiled CPU backend against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from threads import num_threads
from torch import Tensor

from gradstats import reference

C = pytest.importorskip("gradstats._C")

REL = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float64: 1e-12}
NAMES = ("dw", "db", "w_sq_norm", "b_sq_norm", "w_m2", "b_m2")


def case(
    x: tuple[int, ...], out: int, kernel: tuple[int, ...], stride: int = 1, padding: int = 0,
    dilation: int = 1, groups: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """x, g and the geometry as the operation takes them."""
    gen = torch.Generator().manual_seed(seed)
    n = len(kernel)
    size = [
        (x[2 + d] + 2 * padding - dilation * (kernel[d] - 1) - 1) // stride + 1 for d in range(n)
    ]
    xs = torch.randn(x, generator=gen, dtype=torch.float64).to(dtype)
    g = torch.randn((x[0], out, *size), generator=gen, dtype=torch.float64).to(dtype)
    return xs, g, list(kernel), [stride] * n, [padding] * n, [dilation] * n, groups


def check(args: tuple[Any, ...], *flags: bool) -> tuple[Tensor, ...]:
    x, g, *rest = args
    got = C.conv_stats(*args, *flags)
    expected = reference.conv_stats(x.double(), g.double(), *rest, *flags)
    rel = REL[x.dtype]
    stats = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, a, e in zip(NAMES, got, expected, strict=True):
        assert a.shape == e.shape, name
        rounded = name in ("dw", "db")
        assert a.dtype == (x.dtype if rounded else stats), name
        if not a.numel():
            continue
        assert torch.isfinite(a).all(), name
        if name.endswith("sq_norm"):
            torch.testing.assert_close(a.double(), e, rtol=rel, atol=1e-30, msg=name)
        else:
            loose = 8e-3 if rounded and x.dtype == torch.bfloat16 else 2 * rel
            # Of equal samples the m2 is zero, up to the square of the mean's rounding.
            sums = expected[NAMES.index(f"d{name[0]}")] if name.endswith("m2") else e
            floor = (torch.finfo(stats).eps * float(sums.abs().max())) ** 2
            assert (a.double() - e).abs().max() <= loose * e.abs().max() + floor, name
        if name.endswith("m2"):
            assert (a >= 0).all(), name
    return got


GEOMETRIES = {
    "2d": {"x": (3, 5, 9, 8), "out": 7, "kernel": (3, 3), "padding": 1},
    "strided": {"x": (4, 3, 11, 13), "out": 20, "kernel": (3, 5), "stride": 2, "padding": 2},
    "dilated": {"x": (3, 4, 12, 12), "out": 17, "kernel": (3, 2), "dilation": 3},
    "1x1": {"x": (5, 19, 6, 7), "out": 33, "kernel": (1, 1)},
    "1x1 strided": {"x": (5, 9, 6, 7), "out": 8, "kernel": (1, 1), "stride": 2},
    "grouped": {"x": (3, 12, 7, 7), "out": 18, "kernel": (3, 3), "padding": 1, "groups": 3},
    "grouped dilated": {"x": (3, 8, 9, 9), "out": 6, "kernel": (2, 3), "dilation": 2, "groups": 2},
    "depthwise": {"x": (3, 37, 8, 9), "out": 37, "kernel": (3, 3), "padding": 1, "groups": 37},
    "depthwise wide": {"x": (2, 5, 20), "out": 5, "kernel": (15,), "dilation": 1, "groups": 5},
    "depthwise strided": {
        "x": (3, 6, 9, 9), "out": 6, "kernel": (3, 3), "stride": 2, "dilation": 2, "groups": 6,
    },
    "multiplier": {"x": (3, 6, 5, 5), "out": 18, "kernel": (3, 3), "padding": 1, "groups": 6},
    "1d": {"x": (3, 6, 50), "out": 9, "kernel": (7,), "stride": 3, "padding": 2},
    "1d long": {"x": (2, 2, 1500), "out": 3, "kernel": (5,)},
    "3d": {"x": (2, 3, 5, 6, 7), "out": 5, "kernel": (2, 3, 3), "padding": 1, "stride": 2},
    "one position": {"x": (6, 40, 3, 3), "out": 50, "kernel": (3, 3)},
    "few positions": {"x": (9, 60, 4, 4), "out": 70, "kernel": (3, 3), "padding": 1},
    # 8 input channels or more and few positions are summed tap by tap, norms from inner products
    # where that is cheaper: narrow outputs against wide ones.
    "taps": {"x": (5, 13, 5, 7), "out": 35, "kernel": (3, 3), "padding": 1},
    "taps strided": {"x": (4, 20, 7, 9), "out": 150, "kernel": (3, 2), "stride": 2, "padding": 1},
    "taps dilated": {"x": (4, 9, 9, 8), "out": 17, "kernel": (3, 3), "dilation": 2, "padding": 2},
    "taps grouped": {"x": (4, 26, 6, 5), "out": 22, "kernel": (3, 3), "padding": 1, "groups": 2},
    "taps 3d": {"x": (3, 11, 3, 4, 5), "out": 19, "kernel": (2, 3, 3), "padding": 1, "stride": 2},
    "taps 1x1 strided": {"x": (5, 70, 7, 5), "out": 90, "kernel": (1, 1), "stride": 3},
    "Gram": {"x": (5, 150, 3, 2), "out": 161, "kernel": (3, 3), "padding": 1},
    "Gram strided": {"x": (5, 140, 5, 4), "out": 190, "kernel": (3, 4), "stride": 2, "padding": 1},
    "Gram dilated": {"x": (4, 230, 3, 5), "out": 140, "kernel": (3, 3), "stride": 2, "padding": 3,
                     "dilation": 3},
    "Gram grouped": {"x": (4, 280, 2, 2), "out": 360, "kernel": (3, 3), "padding": 1, "groups": 2},
    "Gram 3d": {"x": (3, 120, 1, 2, 2), "out": 140, "kernel": (2, 3, 3), "padding": 1, "stride": 2},
    "outside": {"x": (6, 90, 1, 1), "out": 100, "kernel": (3, 3), "padding": 1},
    "far outside": {"x": (3, 90, 2, 2), "out": 100, "kernel": (2, 2), "padding": 4, "stride": 5},
    "two blocks": {"x": (2, 3, 40, 40), "out": 34, "kernel": (3, 3), "padding": 1},
    "one sample": {"x": (1, 3, 9, 9), "out": 70, "kernel": (3, 3)},
    "no samples": {"x": (0, 3, 9, 9), "out": 7, "kernel": (3, 3)},
}  # fmt: skip
ALL = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("moments", [True, False])
def test_values(geometry: dict[str, Any], dtype: torch.dtype, moments: bool) -> None:
    check(case(**geometry, dtype=dtype), True, True, moments)


@ALL
def test_memory_formats_and_strides(geometry: dict[str, Any]) -> None:
    x, g, *rest = case(**geometry)

    def turned(t: Tensor) -> Tensor:
        """The same shape, the channels innermost in memory."""
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    def spread(t: Tensor) -> Tensor:
        """The same shape, nothing innermost."""
        room = torch.zeros(*t.shape, 2, dtype=t.dtype)
        room[..., 0] = t
        return room[..., 0]

    shared = x[:1].expand(x.shape) if x.shape[0] else x
    mixed = g.flip(0).transpose(0, 1).contiguous().transpose(0, 1)
    ones = torch.ones(()).expand(g.shape)  # as out.sum().backward() gives it
    for xv, gv in ((turned(x), turned(g)), (spread(x), spread(g)), (x, ones), (shared, mixed)):
        check((xv, gv, *rest), True, True, True)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 11), st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_geometry(
    b: int, groups: int, i: int, o: int, spatial: list[tuple[int, int]], stride: int, padding: int,
    dilation: int, moments: bool, seed: int,
) -> None:  # fmt: skip
    assume(all(s + 2 * padding > dilation * (k - 1) for s, k in spatial))
    x = (b, groups * i, *(s for s, _ in spatial))
    kernel = tuple(k for _, k in spatial)
    args = case(x, groups * o, kernel, stride, padding, dilation, groups, torch.float64, seed)
    check(args, True, True, moments)


@pytest.mark.parametrize("flags", [(1, 0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_gives_what_was_asked_for(flags: tuple[int, ...]) -> None:
    check(case(**GEOMETRIES["2d"]), *(bool(f) for f in flags))


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("width", [40, 320])
def test_positions_that_cancel(width: int, moments: bool) -> None:
    """Where the positions of a sample cancel, its norm comes from the gradient itself."""
    x, g, *rest = case((20, width, 2, 2), width, (1, 1))
    x = x[:, :, :1, :1] * (1 + 2**-6 * torch.arange(4.0).view(2, 2))
    g[::2, :, 1] = -g[::2, :, 0]
    g[1::2, :, 1] = 1e-3 - g[1::2, :, 0]
    check((x, g, *rest), True, False, moments)


@pytest.mark.parametrize("moments", [False, True])
def test_samples_in_several_chunks(moments: bool) -> None:
    """More samples than are packed at once, the last chunk not full."""
    check(case((80, 500, 4, 3), 300, (2, 2)), True, False, moments)
    check(case((400, 70, 5, 5), 90, (1, 1), stride=2), True, True, moments)


@pytest.mark.parametrize("name", ["taps", "taps grouped", "Gram", "Gram strided", "outside"])
@pytest.mark.parametrize("moments", [False, True])
def test_unset_memory_is_not_read(name: str, moments: bool) -> None:
    """Every buffer is written before it is read, padding included."""
    args = case(**GEOMETRIES[name])
    want = C.conv_stats(*args, True, False, moments)
    weight = want[0].numel()
    for elements in (64, args[0].numel(), args[1].numel(), weight, weight // 2, 1 << 16):
        poison = [torch.full((elements,), torch.nan) for _ in range(8)]
        del poison
        for a, b in zip(C.conv_stats(*args, True, False, moments), want, strict=True):
            assert torch.equal(a, b)


def test_not_a_number_is_not_hidden() -> None:
    x, g, *rest = case(**GEOMETRIES["Gram"])
    g[2, 5, 1, 1] = torch.nan
    for moments in (False, True):
        sq = C.conv_stats(x, g, *rest, True, False, moments)[2]
        assert sq.isnan().tolist() == [False, False, True, False, False]


def test_nearly_identical_samples() -> None:
    x, g, *rest = case((1, 4, 8, 8), 6, (3, 3), padding=1)
    torch.manual_seed(0)
    gs = g + 1e-3 * torch.randn(64, *g.shape[1:])
    args = (x.expand(64, -1, -1, -1), gs, *rest)
    got = C.conv_stats(*args, True, True, True)
    expected = reference.conv_stats(args[0].double(), gs.double(), *rest, True, True, True)
    for a, e in zip(got[4:], expected[4:], strict=True):
        assert (a >= 0).all()
        torch.testing.assert_close(a.double(), e, rtol=2e-2, atol=0)


def test_long_sums_of_one_sign_stay_exact() -> None:
    x, g, *rest = case((1, 1, 200, 200), 3, (3, 3))
    check((x.abs() + 1, g.abs() + 1, *rest), True, True, True)


@pytest.mark.parametrize("name", ["2d", "few positions", "depthwise", "taps", "Gram"])
def test_bit_reproducible(name: str) -> None:
    args = case(**GEOMETRIES[name])
    for moments in (True, False):
        first = C.conv_stats(*args, True, True, moments)
        for _ in range(5):
            again = C.conv_stats(*args, True, True, moments)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_thread_counts_agree() -> None:
    for count in (1, 3, 8):  # more threads than samples: the panels are shared out
        with num_threads(count):
            for name in ("2d", "grouped", "depthwise", "taps", "Gram", "one sample"):
                check(case(**GEOMETRIES[name]), True, True, True)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(3, 5), r"x must be \(B, I, \*spatial\).*\[3, 5\]"),
        (1, torch.randn(3, 7, 9, 9), r"g has shape \[3, 7, 9, 9\]"),
        (1, torch.randn(4, 7, 9, 8), r"g must be \(B, O, \*out\).*\[4, 7, 9, 8\]"),
        (1, torch.randn(3, 7, 9, 8).double(), "g must have the dtype of x"),
        (2, [3], r"kernel_size must have 2 entries.*\[3\]"),
        (3, [0, 1], "stride and dilation must be positive"),
        (6, 2, "groups must divide the channels"),
    ],
)
def test_refuses(index: int, value: object, message: str) -> None:
    args = list(case(**GEOMETRIES["2d"]))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        C.conv_stats(*args, True, True, True)
