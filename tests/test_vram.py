"""`gradstats vram`: the formula, the line, the search over simulated memory, limits of processes."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_memory import Machine

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench.vram import (
    Point,
    allowed_below,
    formula,
    largest_micro_batch,
    parse_bytes,
    search,
)
from gradstats.workbench.vram.limits import memory_of, ran_out
from gradstats.workbench.vram.line import crossing, fit, spilled
from gradstats.workbench.vram.process import Told, _died

# --- the formula, and which sizes are chosen --------------------------------------------------


@pytest.mark.parametrize(
    ("total", "model", "sample", "largest", "chosen"),
    [(24, 4, 0.2, 100, 64), (12, 3, 0.5, 18, 16), (0.7, 0.1, 0.2, 3, 2), (4, 4.5, 0.1, 0, 0)],
)
def test_the_textbook_formula(total, model, sample, largest, chosen) -> None:
    found = formula(total, model, sample)
    assert (found.largest, found.chosen) == (largest, chosen)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((24, 4, 0), "must take some"), ((-1, 0, 1), "at least 0"), ((float("nan"), 0, 1), "finite")],
)
def test_a_formula_of_impossible_numbers_is_refused(numbers, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        formula(*numbers)


def test_chosen_sizes() -> None:
    assert [allowed_below(m) for m in (0, 1, 3, 4, 100)] == [0, 1, 2, 4, 64]
    assert [allowed_below(m, 8) for m in (18, 8, 7, 100, 0)] == [16, 8, 4, 96, 0]
    assert allowed_below(97, 1) == 97
    with pytest.raises(InvalidArgumentError, match="multiple_of=0"):
        allowed_below(5, 0)


def test_amounts_of_memory() -> None:
    assert parse_bytes("2GB") == parse_bytes("2 g") == parse_bytes("2e9") == 2e9
    assert parse_bytes("1.5GiB") == 1.5 * 2**30
    for text in ("", "GB", "2 lots", "-1GB", "1..5G"):
        with pytest.raises(InvalidArgumentError, match="not an amount of memory"):
            parse_bytes(text)


# --- what points say --------------------------------------------------------------------------


def test_the_line_is_that_of_the_sizes_that_show() -> None:
    peaks = {2: 500, 4: 500, 8: 500, 16: 560, 32: 720}  # 400 + 10·m over a floor of 500
    line = fit([Point(m, p, 1.0, True) for m, p in peaks.items()])
    assert line == pytest.approx((400, 10))
    assert crossing(line, 1000) == 60
    assert fit([Point(m, 500, 1.0, True) for m in (2, 4)]) is None
    # Two fresh processes say more than one that has run other sizes before.
    fresh = [Point(m, 300 + 5 * m, 1.0, True, fresh=True) for m in (16, 64)]
    assert fit([Point(m, p, 1.0, True) for m, p in peaks.items()] + fresh) == pytest.approx(
        (300, 5)
    )


def test_memory_that_a_driver_lends_shows_in_seconds_per_sample() -> None:
    def times(seconds):
        return spilled([Point(2**k, 1, s, True) for k, s in enumerate(seconds)])

    assert times([1, 1.1, 1.3, 1.9]) == 0
    assert times([1, 1.1, 1.3, 12]) == pytest.approx(12 / 1.3 / 2)
    assert times([1]) == 0


# --- the search -------------------------------------------------------------------------------


def run(monkeypatch, machine: Machine, **options):
    monkeypatch.setattr(search, "try_sizes", machine)
    return largest_micro_batch("somewhere:training", **options)


@settings(deadline=None)
@given(
    fixed=st.integers(0, 1200),
    each=st.floats(0.01, 600),
    curved=st.floats(0, 1),
    clumsy=st.floats(0, 200),
    multiple_of=st.sampled_from([None, 1, 8, 24]),
)
def test_what_is_recommended_was_confirmed_and_is_the_largest(
    fixed, each, curved, clumsy, multiple_of
) -> None:
    """Memory that is a line, curved, or larger in fresh processes than the first one told."""

    def peak(size, fresh):
        return int(max(fixed, 300) + each * size + curved * size**1.5 + clumsy * fresh)

    machine = Machine(peak, budget=1000)
    with pytest.MonkeyPatch.context() as patch:
        found = run(patch, machine, multiple_of=multiple_of, max_size=4096)
    allowed = [m for m in range(1, 4097) if allowed_below(m, multiple_of) == m]
    if found.recommended is not None:
        assert (found.recommended, True) in machine.tried
        assert peak(found.recommended, True) <= 900
    best = max((m for m in allowed if peak(m, True) <= 895), default=0)  # bytes are whole numbers
    assert (found.recommended or 0) >= best


def test_the_straight_line_needs_one_confirmation(monkeypatch) -> None:
    machine = Machine(lambda size, fresh: 300 + 2 * size, budget=1000)
    found = run(monkeypatch, machine)
    assert [m for m, fresh in machine.tried if fresh] == [256]  # (900 − 300)/2 = 300
    assert (found.recommended, found.largest, found.limited_by) == (256, 350, "memory")
    assert (found.fixed_bytes, found.bytes_per_sample) == pytest.approx((300, 2))
    assert found.formula.largest == 0  # of a model of 1000 bytes
    assert "Micro-batch 256: fits into 1 kB on cpu with a margin of 10%" in str(found)


def test_a_line_that_was_wrong_is_followed_by_bisection(monkeypatch) -> None:
    """Fresh processes take twice as much: sizes go down until one is confirmed."""
    machine = Machine(lambda size, fresh: (2 if fresh else 1) * (100 + size), budget=1000)
    found = run(monkeypatch, machine, multiple_of=10)
    assert found.recommended == 350
    assert not any(p.ok for p in found.points if p.fresh and p.micro_batch_size > 350)


def test_other_limits_than_memory(monkeypatch) -> None:
    small = Machine(lambda size, fresh: 300 + size / 1e4, budget=1000)
    found = run(monkeypatch, small, max_size=100)
    assert (found.recommended, found.limited_by) == (64, "max_size")
    assert run(monkeypatch, small, max_size=1).recommended == 1
    slow = Machine(lambda size, fresh: 300 + size, seconds=lambda size: size / 10, budget=1e6)
    found = run(monkeypatch, slow, most_seconds=2)
    assert (found.recommended, found.limited_by) == (32, "seconds")


def test_a_line_that_memory_does_not_end_is_no_figure(monkeypatch, command_line) -> None:
    """A sample of a byte, of a billion, and sizes up to 512: nothing has tested the line beyond."""
    slope = Machine(lambda size, fresh: 1000 + size, budget=1e9)
    found = run(monkeypatch, slope, max_size=512)
    assert (found.recommended, found.beyond, found.limited_by) == (512, 512, "max_size")
    code, said, _ = command_line("vram", "somewhere:training", "--max-size", "512")
    assert code == 0
    assert said.count("more than 512, not limited by memory") == 2  # the line and the textbook
    assert "999,99" not in said
    # Twice as far as what ran, the line is believed.
    assert run(monkeypatch, slope, memory=2000, max_size=512, margin=0.0).beyond is None
    near = run(monkeypatch, Machine(lambda size, fresh: 1000 + size, budget=2000), max_size=512)
    assert (near.largest, near.limited_by, near.beyond) == (1000, "max_size", None)
    assert run(monkeypatch, Machine(lambda size, fresh: 300 + size, budget=1000)).beyond is None


def test_nothing_fits(monkeypatch) -> None:
    found = run(monkeypatch, Machine(lambda size, fresh: 2000, budget=1000))
    assert found.recommended is None
    assert str(found) == "No micro-batch fits into 1 kB on cpu with a margin of 10%."


def test_an_interrupt_keeps_what_is_known(monkeypatch) -> None:
    class Interrupted(Machine):
        def __call__(self, trial, sizes, *more):
            if len(sizes) == 1 and self.tried[-1][1]:
                raise KeyboardInterrupt
            super().__call__(trial, sizes, *more)

    found = run(
        monkeypatch, Interrupted(lambda size, fresh: 100 + (4 - 3 * fresh) * size), memory=1000
    )
    assert found.limited_by == "interrupted"
    assert found.recommended == 128
    assert "interrupted before larger ones" in str(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": 0}, "memory=0 must be at least one byte"),
        ({"margin": 1}, "margin=1 must be a fraction"),
        ({"max_size": 0}, "max_size=0"),
        ({"steps": 1}, "steps=1 .* second one holds the optimizer's state"),
        ({"multiple_of": -8}, "multiple_of=-8"),
        ({"most_seconds": 0}, "most_seconds=0"),
    ],
)
def test_bad_arguments(options, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        largest_micro_batch("a:b", **options)


# --- limits -----------------------------------------------------------------------------------


def test_errors_for_want_of_memory_are_told_from_others() -> None:
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ):
        assert ran_out(error)
    for error in (ValueError("shapes"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        assert not ran_out(error)


def test_deaths_for_want_of_memory_are_told_from_others() -> None:
    known = Point(8, 100, 1.0, True)
    for code, said in (
        (-signal.SIGKILL, ""),
        (-signal.SIGSEGV, ""),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'"),
        (1, "libgomp: Thread creation failed: Resource temporarily unavailable"),
    ):
        told = Told([known])
        _died(code, said, told, 16, fresh=True)
        assert not told.points[-1].ok
    for code, points, begun, words in (
        (3, [known], 16, "ended by exit code 3 at a micro-batch of 16 .why"),
        (-signal.SIGSEGV, [], 2, "ended by SIGSEGV at a micro-batch of 2"),
        (-signal.SIGKILL, [], 0, "SIGKILL before a step was taken .*give more"),
    ):
        with pytest.raises(GradStatsError, match=words):
            _died(code, "first\nwhy\n\n", Told(points), begun, fresh=False)


def test_devices_whose_memory_cannot_be_told_are_refused() -> None:
    with pytest.raises(
        GradStatsError, match=r"memory on mps .* can be neither limited nor measured"
    ):
        memory_of(torch.device("mps"))
