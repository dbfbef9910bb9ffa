"""Embedding kernels against the reference in float64, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, LAYOUTS, compare, poisoned, random, run_checks, wide

from gradstats import reference

__all__ = ["poisoned"]

NAMES = "dw sq m2"


def test_embedding_under_the_interpreter():
    run_checks(__file__)


def embedding(ids, g, rows, padding_idx=-1, moments=True):
    from gradstats.kernels.embedding_stats import embedding_stats

    args = (rows, padding_idx, moments)
    got = embedding_stats(ids, g, *args)
    assert got[0].dtype == g.dtype
    compare(got, reference.embedding_stats(ids, wide(g), *args), g.dtype, NAMES)
    assert all(map(torch.equal, got, embedding_stats(ids, g, *args)))  # bit for bit
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 5, 24), (5, 1, 3, 7), (1, 33, 50, 300), (37, 3, 2, 17)])
def check_embedding(shape, moments, dtype):
    b, t, rows, d = shape
    ids = torch.randint(rows, (b, t), dtype=torch.int32 if moments else torch.int64)
    embedding(ids, random(b, t, d, dtype=dtype), rows, -1, moments)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("padding_idx", [0, 1])
def check_padding(padding_idx, rows):
    ids = torch.randint(rows, (6, 11))
    ids[2] = padding_idx  # a sample of nothing else
    got = embedding(ids, random(6, 11, 20, dtype=torch.float32), rows, padding_idx)
    assert got[1][2] == 0
    assert not got[0][padding_idx].any()


@pytest.mark.parametrize("case", ["alike", "by sample", "arange", "long run", "two halves"])
def check_runs_across_chunks(case):
    """Ids and runs that begin, end, or fill whole chunks of 8 positions."""
    b, t = 5, 24
    ids = {
        "alike": torch.zeros(b, t, dtype=torch.long),
        "by sample": torch.arange(b).unsqueeze(1).expand(b, t),
        "arange": torch.arange(t).expand(b, t),
        "long run": torch.where(torch.arange(t) < 3, torch.arange(t), 7).expand(b, t),
        "two halves": torch.randint(2, (b, t)).sort(dim=1)[0] * 20,
    }[case]
    embedding(ids, random(b, t, 10, dtype=torch.float32), t)
    embedding(ids, random(b, t, 10, dtype=torch.float32), t, 7)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def check_layouts(layout):
    ids = torch.randint(6, (14, 4)).t()
    embedding(
        ids, random(4, 14, 12, dtype=torch.float32, layout=layout), 6, -1, layout != "all alike"
    )


def check_nearly_identical_samples():
    ids = torch.randint(6, (1, 12)).expand(7, 12)
    g = random(1, 12, 9, dtype=torch.float32) + 1e-3 * random(7, 12, 9, dtype=torch.float32)
    from gradstats.kernels.embedding_stats import embedding_stats

    m2 = embedding_stats(ids, g, 6, -1, True)[2]
    true = reference.embedding_stats(ids, wide(g), 6, -1, True)[2]
    assert (m2 >= 0).all()
    assert ((m2 - true).norm() / true.norm()).item() < 1e-3


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 3), (1, 1, 1)])
def check_extremes(shape):
    embedding(torch.zeros(shape[:2], dtype=torch.long), torch.randn(shape), 2)


def check_refusals():
    from gradstats.errors import BackendError
    from gradstats.kernels.embedding_stats import embedding_stats

    ids, g = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4)
    with pytest.raises(BackendError, match=r"ids are \(2, 2\), g is \(2, 3, 4\)"):
        embedding_stats(ids[:, :2], g, 5, -1, True)
    with pytest.raises(BackendError, match=r"ids have dtype torch\.float32"):
        embedding_stats(ids.float(), g, 5, -1, True)
    with pytest.raises(BackendError, match=r"g has dtype torch\.float64"):
        embedding_stats(ids, g.double(), 5, -1, True)
