"""What rounding could spoil: cancellation, overflow of squares, offsets past 2³¹."""

from __future__ import annotations

import pytest
import torch
from interpreted import poisoned, random, run_checks, wide

from gradstats import reference

__all__ = ["poisoned"]

HALVES = (torch.bfloat16, torch.float16)
FAR = 2**30  # elements between neighbours of the tensors below: twice it passes 31 bits


def test_precision_under_the_interpreter():
    run_checks(__file__)


def relative(got, true) -> float:
    return ((got.double() - true).abs() / true.abs().clamp_min(1e-300)).max().item()


def collinear(b, t, d, dtype, noise=5e-2):
    """Rows that almost cancel: pairs of ± the same vector, so that a sample's sum is small."""
    sign = torch.ones(t)
    sign[1::2] = -1
    base = torch.randn(b, 1, d) * sign[:, None]
    return (base + noise * torch.randn(b, t, d)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("t", [1, 8, 48])
def check_linear(t, dtype):
    """Inputs alike in every position but for a sign: ‖G‖² is a thousandth of Σ|terms| and less."""
    from gradstats.kernels import linear_config, linear_stats

    for x, g in (
        (random(3, t, 48, dtype=dtype), random(3, t, 32, dtype=dtype)),
        (collinear(3, t, 48, dtype), random(3, 1, 32, dtype=dtype).expand(3, t, 32)),
    ):
        true = reference.linear_stats(wide(x), wide(g), True, False, False)[2]
        for path, c in {c.path: c for d, _, c in linear_config.all_configs() if d == dtype}.items():
            if (path == "rank_one") == (t == 1):
                got = linear_stats.weight_stats(x, g, False, c)[1]
                assert relative(got, true) <= 2e-3, path


def check_a_bf16_gram_would_fail():
    """The Gram in fp32 is right where one rounded to bf16 is not: the inputs above do cancel."""
    x, g = collinear(3, 48, 48, torch.bfloat16), random(3, 1, 32, dtype=torch.bfloat16)
    g = g.expand(3, 48, 32)
    true = reference.linear_stats(wide(x), wide(g), True, False, False)[2]
    xx, gg = (t.float() @ t.float().transpose(1, 2) for t in (x, g))
    assert relative((xx.bfloat16() * gg.bfloat16()).float().sum((1, 2)), true) > 2e-3


@pytest.mark.parametrize("dtype", HALVES)
def check_moments_of_nearly_collinear_samples(dtype):
    from gradstats.kernels.linear_stats import linear_stats

    x = (random(1, 20, 32, dtype=torch.float32) * torch.linspace(1, 1.05, 5)[:, None, None]).to(
        dtype
    )
    g = random(1, 20, 24, dtype=dtype).expand(5, 20, 24)
    m2 = linear_stats(x, g, True, False, True)[4]
    true = reference.linear_stats(wide(x), wide(g), True, False, True)[4]
    assert (m2 >= 0).all()
    assert ((m2 - true).norm() / true.norm()).item() <= 2e-3


@pytest.mark.parametrize("t", [1, 5, 40])
def check_fp16_squares_do_not_overflow(t):
    """Values of hundreds: their squares pass 65504, and so do those of the gradient's elements."""
    from gradstats.kernels.conv_stats import conv_stats
    from gradstats.kernels.embedding_stats import embedding_stats
    from gradstats.kernels.linear_stats import linear_stats

    half = torch.float16
    x = (random(3, t, 16, dtype=torch.float32) * 500).to(half)
    g = (random(3, t, 24, dtype=torch.float32) * 300).to(half)
    got = linear_stats(x, g, False, True, True)
    true = reference.linear_stats(wide(x), wide(g), False, True, True)
    assert relative(got[3], true[3]) <= 1e-5
    small = g / 2**13  # so that dW itself, which is float16, does not overflow
    got = linear_stats(x, small, True, True, t > 1)
    true = reference.linear_stats(wide(x), wide(small), True, True, t > 1)
    assert true[2].max() > 65504
    assert relative(got[2], true[2]) <= 1e-5
    ids = torch.randint(4, (3, t))
    got = embedding_stats(ids, x, 4, -1, True)
    assert relative(got[1], reference.embedding_stats(ids, wide(x), 4, -1, True)[1]) <= 1e-5
    where = ([3], [1], [1], [1], 1, True, False, t > 1)
    across = x.transpose(1, 2), small.transpose(1, 2)
    got, true = conv_stats(*across, *where), reference.conv_stats(*map(wide, across), *where)
    assert relative(got[2], true[2]) <= 1e-5


def check_conv_and_embedding_where_rows_cancel():
    from gradstats.kernels.conv_stats import conv_stats
    from gradstats.kernels.embedding_stats import embedding_stats

    g = collinear(3, 40, 24, torch.bfloat16)
    ids = torch.zeros(3, 40, dtype=torch.long)
    true = reference.embedding_stats(ids, wide(g), 2, -1, False)[1]
    assert relative(embedding_stats(ids, g, 2, -1, False)[1], true) <= 1e-5
    x = random(3, 1, 24, dtype=torch.bfloat16).expand(3, 40, 24).transpose(1, 2)
    where = ([3], [1], [0], [1], 1, True, False, False)
    g = collinear(3, 38, 24, torch.bfloat16).transpose(1, 2)
    true = reference.conv_stats(wide(x), wide(g), *where)[2]
    assert relative(conv_stats(x, g, *where)[2], true) <= 2e-3


def far(*shape: int, dim: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and the same 2³⁰ elements apart in `dim`: address space, hardly memory."""
    assert shape[dim] > 2  # the stride fits in 32 bits, its multiple does not
    values = torch.randn(shape).to(dtype)
    try:
        size = (shape[dim] - 1) * FAR * 4 + 4 * values[0].numel() * 8
        room = torch.UntypedStorage(size, device=values.device)
    except RuntimeError:  # overcommit is off
        pytest.skip("no address space for 2³¹ elements")
    strides = list(values.stride())
    strides[dim] = FAR
    apart = torch.empty(0, dtype=dtype).set_(room, 0, shape, strides)
    apart.copy_(values)
    return values, apart


@pytest.fixture
def _lazy_memory():
    """Filling fresh memory with NaN would touch all of it."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_lazy_memory")
@pytest.mark.parametrize("dim", [0, 1, 2])
def check_offsets_past_31_bits(dim):
    """Far apart in every dimension: a 32-bit product would wrap to another element."""
    from gradstats.kernels import linear_config, linear_stats
    from gradstats.kernels.embedding_stats import embedding_stats
    from gradstats.kernels.tied_cross import tied_cross

    (x, far_x), (g, far_g) = (far(3, 3, 3, dim=dim) for _ in range(2))
    for c in {c.path: c for d, _, c in linear_config.all_configs() if d == x.dtype}.values():
        if c.path != "rank_one":
            got = linear_stats.weight_stats(far_x, far_g, False, c)
            assert all(map(torch.equal, got, linear_stats.weight_stats(x, g, False, c)))
    ids = torch.tensor([[0, 1, 0], [2, 2, 1], [1, 2, 0]])
    got = embedding_stats(ids, far_x, 3, -1, True)
    assert all(map(torch.equal, got, embedding_stats(ids, x, 3, -1, True)))
    assert torch.equal(tied_cross(ids, far_x, far_g, far_x), tied_cross(ids, x, g, x))


@pytest.mark.usefixtures("_lazy_memory")
@pytest.mark.parametrize("dim", [0, 2, 3])
def check_conv_offsets_past_31_bits(dim):
    from gradstats.kernels.conv_stats import conv_stats

    x, far_x = far(3, 1, 4, 4, dim=dim)
    g, far_g = far(3, 1, 3, 3, dim=dim)
    for moments in (False, True):  # Gram and implicit GEMM
        where = ([2, 2], [1, 1], [0, 0], [1, 1], 1, True, False, moments)
        assert all(map(torch.equal, conv_stats(far_x, far_g, *where), conv_stats(x, g, *where)))
