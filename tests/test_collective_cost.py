"""What collectives cost, against closed forms. Bytes really sent: tests/rank_cases_bytes.py."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstats.collective_cost import (
    Network,
    all_gather_bytes,
    all_gather_seconds,
    all_reduce_bytes,
    all_reduce_seconds,
    fastest,
    moments_bytes,
    statistics_bytes,
)
from gradstats.errors import InvalidArgumentError

NET = Network(bytes_per_second=1e9, latency=1e-5)


def test_by_hand():
    assert statistics_bytes(148) == 24 * 148 + 16
    assert moments_bytes(1000) == 4000
    assert all_gather_bytes(3568, 4) == 3 * 3568
    assert all_reduce_bytes(1000, 4) == 1500
    assert all_gather_seconds(10**6, 4, NET) == pytest.approx(3 * (1e-5 + 1e-3))
    assert all_gather_seconds(10**6, 4, NET, "tree") == pytest.approx(2 * 1e-5 + 3e-3)
    assert all_reduce_seconds(10**6, 4, NET) == pytest.approx(6 * 1e-5 + 1.5e-3)
    assert all_reduce_seconds(10**6, 16384, NET, "tree") == pytest.approx(
        28 * 1e-5 + 2e-3, rel=1e-4
    )
    assert fastest(all_gather_seconds, 10**6, 4, NET) == pytest.approx(2e-5 + 3e-3)


@pytest.mark.parametrize("seconds", [all_gather_seconds, all_reduce_seconds])
@pytest.mark.parametrize("shape", ["ring", "tree"])
def test_one_rank_sends_nothing(seconds, shape):
    assert seconds(10**9, 1, NET, shape) == 0


@given(st.integers(1, 10**12), st.integers(1, 20_000), st.floats(1e6, 1e12), st.floats(0, 1e-3))
def test_more_of_anything_never_takes_less_time(size, world, speed, latency):
    net, slower = Network(speed, latency), Network(speed / 2, latency * 2)
    for seconds in (all_gather_seconds, all_reduce_seconds):
        for shape in ("ring", "tree"):
            base = seconds(size, world, net, shape)
            assert 0 <= base < math.inf
            assert seconds(size, world + 1, net, shape) >= base
            assert seconds(2 * size, world, net, shape) >= base
            assert seconds(size, world, slower, shape) >= base
        assert fastest(seconds, size, world, net) <= seconds(size, world, net)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Network(0, 1e-6), "bytes_per_second=0 cannot be used; pass a number above 0"),
        (lambda: Network(1e9, -1), "latency=-1 cannot be used"),
        (lambda: statistics_bytes(0), "num_parameters=0"),
        (lambda: all_gather_bytes(8, 0), "world_size=0"),
        (lambda: all_reduce_seconds(8, 2, NET, "star"), r"shape='star'.*\('ring', 'tree'\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


def test_the_page_is_what_the_script_writes(tmp_path):
    root = Path(__file__).parents[1]
    script = root / "bench" / "many_machines.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path / "page.md")], check=True)
    assert (tmp_path / "page.md").read_text() == (root / "docs" / "many_machines.md").read_text()
