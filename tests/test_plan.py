"""Which samples each rank takes in each micro-batch: pure numbers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.plan import row_sizes, rows, share

SIZES = st.integers(1, 7)


@settings(deadline=None)
@given(st.integers(0, 200), SIZES, SIZES)
def test_rows_hold_every_sample_and_every_rank_in_each(n, micro, world):
    sizes = list(row_sizes(n, micro, world))
    assert sum(sizes) == (n if n >= world else 0)
    most = micro * world if micro > 1 else 2 * world - 1
    assert all(world <= size <= most for size in sizes)
    every = [list(rows(0, n, micro, rank, world)) for rank in range(world)]
    assert {len(mine) for mine in every} == {len(sizes)}
    positions = [
        i for row in zip(*every, strict=True) for first, end in row for i in range(first, end)
    ]
    assert positions == list(range(sum(sizes)))
    if micro > 1:
        assert all(1 <= end - first <= micro for mine in every for first, end in mine)


@settings(deadline=None)
@given(st.integers(1, 200), SIZES, SIZES, st.data())
def test_a_plan_goes_on_from_any_row(n, micro, world, data):
    sizes = list(row_sizes(n, micro, world))
    done = data.draw(st.integers(0, len(sizes)))
    assert list(row_sizes(n - sum(sizes[:done]), micro, world)) == sizes[done:] * (n >= world)


@settings(deadline=None)
@given(st.integers(0, 200), SIZES, SIZES)
def test_full_rows_are_of_one_size(n, micro, world):
    sizes = list(row_sizes(n, micro, world, full=True))
    assert set(sizes) <= {micro * world}
    assert 0 <= n - sum(sizes) < micro * world


@settings(deadline=None)
@given(st.integers(1, 60), SIZES)
def test_shares_differ_by_one_at_most(size, world):
    parts = [share(size, rank, world) for rank in range(world)]
    lengths = [end - first for first, end in parts]
    assert sum(lengths) == size
    assert max(lengths) - min(lengths) <= 1
