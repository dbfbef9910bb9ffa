"""The tied cross term's kernel against the reference in float64, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, LAYOUTS, poisoned, random, run_checks, wide

from gradstats import reference

__all__ = ["poisoned"]


def test_tied_cross_under_the_interpreter():
    run_checks(__file__)


def tied(ids, e, h, a):
    from gradstats.kernels.tied_cross import tied_cross

    got = tied_cross(ids, e, h, a)
    true = reference.tied_cross(ids, wide(e), wide(h), wide(a))
    # The terms have either sign: against the sum of their sizes, as rounding is.
    size = reference.tied_cross(ids, wide(e).abs(), wide(h).abs(), wide(a).abs())
    assert got.dtype == torch.float32
    assert got.shape == true.shape
    assert not got.isnan().any()
    limit = 1e-6 if e.dtype == torch.float32 else 1e-5  # products of 16-bit numbers are exact
    assert ((got.double() - true).abs() <= limit * size).all()
    assert torch.equal(got, tied_cross(ids, e, h, a))  # bit for bit
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(3, 40, 40, 24, 50), (2, 1, 7, 5, 3), (4, 70, 33, 130, 9)])
def check_tied(case, dtype):
    b, t, s, d, rows = case
    ids = torch.randint(-1, rows, (b, t), dtype=torch.int32 if s == t else torch.int64)
    e, a = random(b, t, d, dtype=dtype), random(b, s, d, dtype=dtype)
    tied(ids, e, random(b, s, rows, dtype=dtype), a)


def check_against_whole_gradients():
    """What it is for: the squared norm of a tied weight's gradient."""
    ids = torch.randint(6, (3, 8))
    e, h, a = (random(3, 8, d, dtype=torch.float32) for d in (5, 6, 5))
    got = tied(ids, e, h, a)
    for i in range(3):
        embedding = torch.zeros(6, 5).index_add_(0, ids[i], e[i])
        head = h[i].t() @ a[i]
        apart = embedding.square().sum() + head.square().sum()
        torch.testing.assert_close(apart + 2 * got[i], (embedding + head).square().sum())


def check_no_row():
    """Ids of -1 take no part, whatever the gradient beside them is."""
    ids, e = torch.full((2, 5), -1), random(2, 5, 4, dtype=torch.float32)
    h, a = random(2, 3, 7, dtype=torch.float32), random(2, 3, 4, dtype=torch.float32)
    assert not tied(ids, e, h, a).any()
    ids[:, 2] = 6
    assert tied(ids, e, h, a).all()


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def check_layouts(layout):
    ids = torch.randint(-1, 9, (20, 3)).t()
    e, h, a = (random(3, n, d, dtype=torch.bfloat16, layout=layout)
               for n, d in ((20, 12), (18, 9), (18, 12)))  # fmt: skip
    tied(ids, e, h, a)


@pytest.mark.parametrize(("b", "t", "s"), [(0, 4, 3), (3, 0, 3), (3, 3, 0)])
def check_extremes(b, t, s):
    tied(torch.zeros(b, t, dtype=torch.long), *(torch.randn(b, n, 4) for n in (t, s, s)))


def check_refusals():
    from gradstats.errors import BackendError
    from gradstats.kernels.tied_cross import tied_cross

    ids, e, h = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4), torch.randn(2, 5, 7)
    with pytest.raises(BackendError, match=r"and \(2, 6, 4\)\. Expected \(B, T\), \(B, T, D\)"):
        tied_cross(ids, e, h, torch.randn(2, 6, 4))
    with pytest.raises(BackendError, match=r"e is torch.float32, a is torch.float16"):
        tied_cross(ids, e, h, torch.randn(2, 5, 4).half())
