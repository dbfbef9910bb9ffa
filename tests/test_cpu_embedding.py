"""Embedding statistics of the compiled CPU backend against float64."""

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


def check(ids: Tensor, g: Tensor, rows: int, padding_idx: int = -1, moments: bool = True) -> None:
    got = C.embedding_stats(ids, g, rows, padding_idx, moments)
    dw, sq_norm, m2 = reference.embedding_stats(ids, g.double(), rows, padding_idx, moments)
    rel = REL[g.dtype]
    stats = torch.float64 if g.dtype == torch.float64 else torch.float32
    assert [t.dtype for t in got] == [g.dtype, stats, stats]
    assert [t.shape for t in got] == [dw.shape, sq_norm.shape, m2.shape]
    top = dw.abs().max() if dw.numel() else torch.zeros(())
    loose = 8e-3 if g.dtype == torch.bfloat16 else 2 * rel
    torch.testing.assert_close(got[0].double(), dw, rtol=loose, atol=float(top) * rel)
    torch.testing.assert_close(got[1].double(), sq_norm, rtol=rel, atol=1e-30)
    if moments:
        assert (got[2] >= 0).all()
        torch.testing.assert_close(got[2].double(), m2, rtol=2 * rel, atol=float(top) ** 2 * rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(5, 7, 11, 13), (8, 64, 4, 33), (1, 20, 100, 16), (6, 1, 9, 1), (3, 600, 2, 40)]
)
def test_values(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, t, rows, d = shape
    torch.manual_seed(0)
    check(torch.randint(0, rows, (b, t)), torch.randn(b, t, d).to(dtype), rows)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6), st.integers(0, 12), st.integers(1, 9), st.integers(1, 40),
    st.integers(-1, 8), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    b: int, t: int, rows: int, d: int, padding_idx: int, moments: bool, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (b, t), generator=gen)
    g = torch.randn(b, t, d, generator=gen, dtype=torch.float64)
    check(ids, g, rows, min(padding_idx, rows - 1), moments)


def test_rows_repeated_within_a_sample_add_up_before_squaring() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    _, sq_norm, _ = C.embedding_stats(ids, torch.ones(1, 4, 3), 2, -1, False)
    assert sq_norm.tolist() == [48.0]


def test_absent_samples_count_as_zeros() -> None:
    ids = torch.tensor([[0], [1], [1], [1]])
    _, _, m2 = C.embedding_stats(ids, torch.full((4, 1, 2), 4.0), 3, -1, True)
    assert m2.tolist() == [[12.0, 12.0], [12.0, 12.0], [0.0, 0.0]]


def test_padding_and_unused_rows_get_nothing() -> None:
    ids = torch.tensor([[0, 2], [2, 2]])
    dw, sq_norm, m2 = C.embedding_stats(ids, torch.randn(2, 2, 5), 4, 2, True)
    for row in (1, 2, 3):
        assert not dw[row].any()
        assert not m2[row].any()
    assert sq_norm[1] == 0


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_dtypes_and_strides(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (10, 4)).to(kind).t()
    check(ids, torch.ones(()).expand(4, 10, 6), 9)
    check(ids, torch.randn(10, 4, 6).transpose(0, 1), 9)
    check(ids, torch.randn(4, 6, 10).transpose(1, 2), 9)
    check(ids, torch.randn(1, 10, 6).expand(4, 10, 6), 9)
    check(torch.arange(10).expand(4, 10), torch.randn(4, 10, 6), 10)  # a position table


def test_nearly_identical_samples() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([0, 1, 1, 2]).expand(64, 4)
    g = torch.randn(1, 4, 24) + 1e-3 * torch.randn(64, 4, 24)
    m2 = C.embedding_stats(ids, g, 3, -1, True)[2]
    expected = reference.embedding_stats(ids, g.double(), 3, -1, True)[2]
    assert (m2 >= 0).all()
    torch.testing.assert_close(m2.double(), expected, rtol=1e-2, atol=0)


def test_bit_reproducible_and_independent_of_threads() -> None:
    torch.manual_seed(0)
    ids, g = torch.randint(0, 50, (9, 80)), torch.randn(9, 80, 33)
    first = C.embedding_stats(ids, g, 50, -1, True)
    threads = torch.get_num_threads()
    for count in (threads, 1, threads):
        with num_threads(count):
            again = C.embedding_stats(ids, g, 50, -1, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    ids = torch.tensor([[0, bad, 1]])
    with pytest.raises((RuntimeError, IndexError), match=rf"ids must be in \[0, 7\), got {bad}"):
        C.embedding_stats(ids, torch.randn(1, 3, 2), 7, -1, True)


def test_wrong_arguments_are_refused() -> None:
    ids, g = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=r"ids must be integers.*Float"):
        C.embedding_stats(ids.float(), g, 5, -1, False)
    with pytest.raises(RuntimeError, match=r"g must be \(B, T, D\).*\[2, 4\]"):
        C.embedding_stats(ids, g[:, 0], 5, -1, False)
