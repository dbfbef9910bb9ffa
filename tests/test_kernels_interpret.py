"""Linear and normalisation kernels against the reference in float64, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted import DTYPES, LAYOUTS, compare, poisoned, random, run_checks, wide

from gradstats import reference

__all__ = ["poisoned"]


def test_kernels_under_the_interpreter():
    run_checks(__file__)


LINEAR = "dw db w_sq b_sq w_m2 b_m2"
NORM = f"dx {LINEAR}"


def linear(x, g, *flags):
    from gradstats.kernels.linear_stats import linear_stats

    got = linear_stats(x, g, *flags)
    compare(got, reference.linear_stats(wide(x), wide(g), *flags), x.dtype, LINEAR)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 70, 40, 72), (5, 1, 33, 7), (1, 5, 64, 48), (4, 20, 17, 130), (2, 131, 3, 5)]
)
def check_linear(shape, moments, dtype):
    b, t, i, o = shape
    linear(random(b, t, i, dtype=dtype), random(b, t, o, dtype=dtype), True, True, moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("t", [1, 6, 48])
def check_linear_layouts(t, layout, dtype):
    x = random(3, t, 32, dtype=dtype, layout=layout)
    g = random(3, t, 24, dtype=dtype, layout=LAYOUTS[-1 - LAYOUTS.index(layout)])
    linear(x, g, True, True, False)
    if "all alike" not in (layout, LAYOUTS[-1 - LAYOUTS.index(layout)]):  # no spread to compare
        linear(x, g, True, True, True)


@pytest.mark.parametrize(
    ("batch", "programs", "moments"),
    [(3, 4, True), (2, 9, True), (1, 4, False), (3, 1, False), (2, 40, True)],  # for 6 tiles
)
def check_schedules(batch, programs, moments, monkeypatch):
    """More tiles than programs and fewer, samples and parts of samples shared; tiles stick out."""
    from gradstats.kernels import _common, linear_config, linear_stats
    from gradstats.kernels.schedule import schedules

    launched = []
    launch = _common.launch
    monkeypatch.setattr(_common, "launch", lambda *a: (launch(*a), launched.append(a[2])))
    x, g = random(batch, 33, 35, dtype=torch.float32), random(batch, 33, 18, dtype=torch.float32)
    dw, _, sq, _, m2, _ = reference.linear_stats(wide(x), wide(g), True, False, moments)
    for schedule in schedules(programs, 6, batch, 3):
        c = linear_config.Config("fused", 16, 16, 16, 4, 1, schedule=schedule)
        got = linear_stats.weight_stats(x, g, moments, c)
        compare(got, (dw, sq, m2), x.dtype, "dw w_sq w_m2")
        lists = (schedule.runs(p, 6, batch, 3) for p in range(programs))
        slots = {run.slot for runs in lists for run in runs} - {None}
        written = (~launched[-1]["sums"].isnan().any(1)).nonzero().flatten().tolist()
        assert set(written) == slots  # the kernel does what the lists say
        again = linear_stats.weight_stats(x, g, moments, c)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize(("t", "sms"), [(20, 132), (40, 132), (40, 12), (20, 1)])
def check_gram_of_shared_columns(t, sms, monkeypatch):
    """Parts of the columns by a program each, some of them past the end of the narrower input."""
    from gradstats.kernels import _common, linear_config, linear_stats

    launched = []
    launch = _common.launch
    monkeypatch.setattr(_common, "launch", lambda *a: (launch(*a), launched.append(a[2])))
    monkeypatch.setattr(_common, "num_sms", lambda like: sms)
    x, g = random(2, t, 330, dtype=torch.float32), random(2, t, 70, dtype=torch.float32)
    c = linear_config.Config("gram", 0, 32, 32, 4, 1)
    got = linear_stats.weight_stats(x, g, False, c)
    assert launched[0]["PARTS"] == {132: 2, 12: 2, 1: 1}[sms]
    dw, _, sq, *_ = reference.linear_stats(wide(x), wide(g), True, False, False)
    compare(got[:2], (dw, sq), x.dtype, "dw w_sq")
    assert torch.equal(got[1], linear_stats.weight_stats(x, g, False, c)[1])  # bit for bit


def check_paths_agree():
    from gradstats.kernels import linear_config, linear_stats

    x, g = random(3, 40, 24, dtype=torch.float32), random(3, 40, 20, dtype=torch.float32)
    tiles = {c.path: c for dtype, _, c in linear_config.all_configs() if dtype == x.dtype}
    gram = linear_stats.weight_stats(x, g, False, replace(tiles["gram"], block_t=16))
    fused = linear_stats.weight_stats(x, g, False, tiles["fused"])
    torch.testing.assert_close(gram[1], fused[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [1, 20])
def check_moments_of_nearly_identical_samples(t):
    """The spread is 1e-6 of the mean square: Σc² − (Σc)²/N in float32 has no digit left."""
    x = random(1, t, 24, dtype=torch.float32) + 1e-3 * random(6, t, 24, dtype=torch.float32)
    g = random(1, t, 20, dtype=torch.float32) + 1e-3 * random(6, t, 20, dtype=torch.float32)
    expected = reference.linear_stats(wide(x), wide(g), True, True, True)
    from gradstats.kernels.linear_stats import linear_stats

    got = linear_stats(x, g, True, True, True)
    for a, e in ((got[4], expected[4]), (got[5], expected[5])):
        assert (a >= 0).all()
        assert ((a - e).norm() / e.norm()).item() < 1e-3
    each = torch.einsum("bto,bti->boi", g, x)
    naive = each.square().sum(0) - each.sum(0).square() / 6
    assert ((naive - expected[4]).norm() / expected[4].norm()).item() > 1e-2


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (3, 0, 3, 2), (1, 1, 1, 1), (1, 3, 1, 1)])
def check_linear_extremes(shape):
    b, t, i, o = shape
    x, g = torch.randn(b, t, i), torch.randn(b, t, o)
    got = linear(x, g, True, True, True)
    if b == 1:
        assert not got[4].any()  # one sample has no spread
    for flags in ((True, False, False), (False, True, True), (False, False, True)):
        linear(x, g, *flags)


def layer_norm(x, g, scale, rms, *flags):
    from gradstats.kernels.layer_norm_stats import layer_norm_stats

    mean = None if rms else x.float().mean(-1)
    rstd = (x.float().square().mean(-1) + 1e-5).rsqrt()  # any factor will do
    args = (g, x, mean, rstd, scale)
    got = layer_norm_stats(*args, *flags)
    compare(got, reference.layer_norm_stats(*map(wide, args), *flags), x.dtype, NORM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(3, 70, 40), (2, 1, 700), (1, 5, 64), (40, 9, 17)])
def check_layer_norm(shape, rms, dtype):
    x, g = random(*shape, dtype=dtype) + 1, random(*shape, dtype=dtype)
    layer_norm(x, g, torch.randn(shape[2]).to(dtype), rms, True, True, True, True)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def check_norm_layouts(layout):
    g = random(3, 12, 20, dtype=torch.float32, layout=layout)
    x = random(3, 12, 20, dtype=torch.float32, layout="every other")
    layer_norm(x, g, torch.randn(20), False, True, True, True, False)
    group_norm(x, g, 4, torch.randn(12), True, True, True, False)


@pytest.mark.parametrize("flags", [(1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1), (1, 1, 0, 0)])
def check_norm_flags(flags):
    flags = tuple(map(bool, flags))
    x, g = (random(3, 12, 20, dtype=torch.float32) for _ in range(2))
    for scale in (True, False):
        layer_norm(x, g, torch.randn(20) if scale else None, False, *flags)
        layer_norm(x, g, torch.randn(20) if scale else None, True, *flags)
        group_norm(x, g, 3, torch.randn(12) if scale else None, *flags)


def check_norm_mixed_dtypes():
    """As under autocast: 16-bit activations, 32-bit parameters."""
    x, g = (random(3, 12, 20, dtype=torch.bfloat16) for _ in range(2))
    layer_norm(x, g, torch.randn(20), False, True, True, True, True)
    group_norm(x, g, 3, torch.randn(12), True, True, True, True)


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 3)])
def check_norm_without_elements(shape):
    x, g = torch.randn(shape), torch.randn(shape)
    layer_norm(x, g, torch.randn(3), False, True, True, True, True)


def group_norm(x, g, groups, scale, *flags):
    from gradstats.kernels.group_norm_stats import group_norm_stats

    grouped = x.float().reshape(x.shape[0], groups, -1)
    mean, rstd = grouped.mean(-1), (grouped.var(-1, unbiased=False) + 1e-5).rsqrt()
    args = (g, x, mean, rstd, scale)
    got = group_norm_stats(*args, *flags)
    compare(got, reference.group_norm_stats(*map(wide, args), *flags), x.dtype, NORM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(3, 12, 49, 4), (2, 6, 2100, 2), (1, 8, 5, 1), (4, 6, 7, 6)])
def check_group_norm(case, dtype):
    *shape, groups = case
    x, g = random(*shape, dtype=dtype) + 1, random(*shape, dtype=dtype)
    group_norm(x, g, groups, torch.randn(shape[1]).to(dtype), True, True, True, True)


def check_refusals():
    from gradstats.errors import BackendError
    from gradstats.kernels.layer_norm_stats import layer_norm_stats
    from gradstats.kernels.linear_stats import linear_stats

    x = torch.randn(2, 3, 4)
    with pytest.raises(BackendError, match=r"x has dtype torch\.float64"):
        linear_stats(x.double(), x.double(), True, True, True)
    with pytest.raises(BackendError, match=r"x is torch.float32, g is torch.bfloat16"):
        linear_stats(x, x.bfloat16(), True, True, True)
    with pytest.raises(BackendError, match=r"g is \(2, 2, 4\)"):
        linear_stats(x, x[:, :2], True, True, True)
    with pytest.raises(BackendError, match=r"rstd has shape \(2, 2\). Expected \(2, 3\)"):
        layer_norm_stats(x, x, None, x[:, :2, 0], None, True, True, True, True)
    long = torch.randn(1, 1, 8200)
    with pytest.raises(BackendError, match="D is 8200"):
        layer_norm_stats(long, long, None, long[..., 0], None, True, True, True, True)
