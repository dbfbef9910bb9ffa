"""Convolution kernels against the reference in float64, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, compare, poisoned, run_checks, wide

from gradstats import reference

__all__ = ["poisoned"]

NAMES = "dw db w_sq b_sq w_m2 b_m2"
# I, O, groups, size, kernel, stride, padding, dilation
CASES = {
    "1d": (5, 7, 1, (19,), (3,), (2,), (1,), (1,)),
    "1d dilated": (4, 6, 2, (19,), (3,), (1,), (4,), (2,)),
    "2d": (6, 10, 1, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d uneven": (3, 5, 1, (8, 11), (2, 5), (2, 1), (1, 3), (1, 2)),
    "2d groups": (12, 8, 4, (7, 6), (3, 2), (1, 2), (1, 0), (2, 1)),
    "many channels": (70, 66, 1, (5, 6), (2, 1), (1, 1), (1, 0), (1, 1)),
    "3d": (3, 4, 1, (5, 6, 4), (2, 3, 3), (1, 2, 1), (1, 0, 1), (2, 1, 1)),
    "one position": (3, 4, 1, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
    "one padded position": (3, 4, 1, (2, 2), (4, 4), (1, 1), (1, 1), (1, 1)),
    "pointwise": (6, 10, 1, (5, 6), (1, 1), (1, 1), (0, 0), (1, 1)),
    "pointwise, stride 2": (6, 10, 1, (5, 6), (1, 1), (2, 2), (0, 0), (1, 1)),
    "patches apart": (3, 10, 1, (9, 6), (3, 2), (4, 2), (0, 0), (1, 1)),
    "depthwise": (9, 9, 9, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise, multiplied": (5, 10, 5, (6, 7), (3, 2), (2, 1), (1, 0), (1, 2)),
    "depthwise 1d": (40, 40, 40, (50,), (4,), (1,), (3,), (1,)),
    "depthwise 3d": (4, 4, 4, (4, 5, 6), (2, 3, 2), (1, 1, 2), (0, 1, 1), (2, 1, 1)),
    "padding alone": (2, 3, 1, (3,), (1,), (4,), (4,), (1,)),
}


def test_conv_under_the_interpreter():
    run_checks(__file__)


def tensors(case, dtype, batch=3, offset=0.0):
    i, o, _, size, kernel, stride, padding, dilation = CASES[case]
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
           for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]  # fmt: skip
    return torch.randn(batch, i, *size).to(dtype) + offset, torch.randn(batch, o, *out).to(dtype)


def conv(case, x, g, *flags):
    from gradstats.kernels.conv_stats import conv_stats

    _, _, groups, _, *where = CASES[case]
    got = conv_stats(x, g, *where, groups, *flags)
    assert got[0].dtype == x.dtype
    compare(got, reference.conv_stats(wide(x), wide(g), *where, groups, *flags), x.dtype, NAMES)
    again = conv_stats(x, g, *where, groups, *flags)
    assert all(map(torch.equal, got, again))  # bit for bit
    return got


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def check_conv(case, dtype, moments):
    conv(case, *tensors(case, dtype), True, True, moments)


def fused(case, moments, tile, splits, parts, batch, monkeypatch):
    """Force the implicit GEMM, whatever would be cheaper."""
    from gradstats.kernels import conv_config, conv_stats, linear_config

    i, _, groups, *_ = CASES[case]
    channels = min(tile[1], linear_config.next_power_of_2(i // groups))
    c = linear_config.Config("fused", *tile, 4, 1)
    split = conv_config.Split(splits, parts)
    monkeypatch.setattr(conv_stats, "conv_config", lambda *_: (c, split, channels))
    x, g = tensors(case, torch.float32, batch)
    return conv(case, x, g, True, False, moments)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(
    ("case", "splits", "parts"),
    [("1d dilated", 1, 3), ("2d uneven", 3, 1), ("2d groups", 2, 1), ("2d groups", 1, 2),
     ("many channels", 2, 1), ("3d", 1, 1)],
)  # fmt: skip
def check_implicit_gemm(case, splits, parts, moments, monkeypatch):
    fused(case, moments, (64, 32, 16), splits, parts, 3, monkeypatch)


@pytest.mark.parametrize("case", ["2d groups", "many channels", "3d", "one padded position"])
def check_gram_agrees(case, monkeypatch):
    from gradstats.kernels import conv_stats, linear_config

    x, g = tensors(case, torch.float32)
    tile = linear_config.Config("gram", 0, 32, 16, 4, 1)
    monkeypatch.setattr(conv_stats, "conv_config", lambda *_: (tile, None, 0))
    conv(case, x, g, True, False, False)


@pytest.mark.parametrize("batch", [1, 2, 5])
def check_depthwise_parts(batch, monkeypatch):
    from gradstats.kernels import _common, conv_depthwise

    monkeypatch.setattr(conv_depthwise, "POSITIONS", 8)
    for sms in (1, 4):
        monkeypatch.setattr(_common, "DEFAULT_SMS", sms)
        for moments in (False, True):
            x, g = tensors("depthwise 1d", torch.float32, batch)
            conv("depthwise 1d", x, g, True, False, moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["2d", "2d groups", "depthwise", "pointwise", "2d uneven"])
def check_layouts(case, dtype):
    x, g = tensors(case, dtype)
    last = torch.channels_last
    conv(case, x.to(memory_format=last), g.to(memory_format=last), True, True, True)
    conv(case, x.repeat_interleave(2, 3)[..., ::2], g, True, True, False)
    conv(case, x[:1].expand(3, -1, -1, -1), g, True, True, False)
    conv(case, x, g[:, :1, :1, :1].expand_as(g), True, True, False)


@pytest.mark.parametrize("case", ["2d", "depthwise"])
def check_nearly_identical_samples(case):
    from gradstats.kernels.conv_stats import conv_stats

    x, g = tensors(case, torch.float32, 6)
    x, g = (t[:1] + 1e-3 * t for t in (x, g))
    _, _, groups, _, *where = CASES[case]
    m2 = conv_stats(x, g, *where, groups, True, False, True)[4]
    true = reference.conv_stats(wide(x), wide(g), *where, groups, True, False, True)[4]
    assert (m2 >= 0).all()
    assert ((m2 - true).norm() / true.norm()).item() < 1e-3


@pytest.mark.parametrize("flags", [(1, 0, 0), (0, 1, 1), (0, 0, 1)])
def check_flags(flags):
    conv("2d", *tensors("2d", torch.float32), *map(bool, flags))


def check_empty_batch():
    conv("2d", *tensors("2d", torch.float32, 0), True, True, True)


def check_division_by_multiplication():
    from gradstats.kernels.conv_layout import divisor

    for d in (*range(1, 300), 2**16 - 1, 2**16, 2**30 - 1, 2**30 + 1, 2**31 - 1):
        magic, shift = divisor(d)
        assert magic < 2**32
        for n in (0, 1, d - 1, d, d + 1, 7 * d - 1, 2**31 - 1, 2**31 - d):
            if 0 <= n < 2**31:
                assert ((n * magic >> 32) + n) >> shift == n // d


def check_refusals():
    from gradstats.errors import BackendError
    from gradstats.kernels.conv_stats import conv_stats

    rest = ([3], [1], [1], [1], 1, True, False, False)
    x = torch.randn(2, 3, 4)
    with pytest.raises(BackendError, match="Expected 1 to 3 spatial dimensions"):
        conv_stats(x, x[0], *rest)
    with pytest.raises(BackendError, match=r"x is torch.float32, g is torch.bfloat16"):
        conv_stats(x, x.bfloat16(), *rest)
    with pytest.raises(BackendError, match=r"x has 2147483648 positions per sample"):
        conv_stats(torch.empty(1).expand(1, 1, 2**31), x[:1], *rest)
