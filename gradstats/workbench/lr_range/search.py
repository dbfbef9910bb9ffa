"""The learning-rate range test: short runs from the same weights, at one batch size or jointly at several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from gradstats.errors import InvalidArgumentError
from gradstats.workbench.lr_range.curve import Curve
from gradstats.workbench.lr_range.result import LrRange
from gradstats.workbench.lr_range.runs import CHUNK, Runs
from gradstats.workbench.lr_range.scaling import Scaling, fit_scaling
from gradstats.workbench.lr_range.scan import read, scan
from gradstats.workbench.workload import Workload

__all__ = ["lr_range"]

Report = Callable[[str, float], object]


def lr_range(
    workload: Workload,
    *,
    batch_sizes: Sequence[int] = (),
    steps: int = 20,
    repeats: int = 3,
    window: tuple[float, float] | None = None,
    loss_samples: int = 1024,
    seed: int = 0,
    report: Report = lambda text, done: None,
) -> LrRange:
    """Which learning rates the workload trains at from where it is now, and how they go with its batch.

    Every rate gets runs of its own: `steps` optimizer steps at that rate, from the same weights and
    optimizer state, and the loss after them on samples that no run trains on. That is more than one ramp
    through all rates, and says more: on a ramp the rates before have brought the loss along, and the steep
    directions have shrunk while the rate was good for them, so that it rises late, at several times the
    largest stable rate. Rates are first searched by one repeat, √10 apart, then run on a grid (four to the
    decade), and refined around the best one and at the ends: the upper to a tenth.

    Args:
        workload: as of `gradstats.workbench.workload`. It is as before when this returns or raises: weights,
            gradients, buffers, modes, optimizer state and hyperparameters and random numbers are compared
            by a hash.
        batch_sizes: default the workload's, else 32. From three on, a rule is fitted to the best rates
            (`fit_scaling`); more `repeats` make it surer.
        steps: of each run; the same number at every batch size. One step gives the best rate of a single
            step, which is what the saturating rule is derived for.
        repeats: runs at each rate, of different data orders and random numbers: the noise.
        window: (low, high) rates to stay within; default found, from the optimizer's present rate.
        loss_samples: on which the loss after a run is taken, at most.
        seed: of the first repeat.
        report: called with a text and the part done, from 0 to 1.

    After Ctrl-C it returns what is known by then (`interrupted`).

    Raises InvalidArgumentError for arguments out of range, GradStatsError where the loss is not finite at
    the start, or something could not be restored. Errors of the workload itself are passed on.
    """
    sizes = list(dict.fromkeys(batch_sizes)) or [workload.batch_size or 32]
    _check(sizes, steps, repeats, window, loss_samples, seed)
    chunk = max(CHUNK, *sizes)
    runs = Runs(workload, steps=steps, loss_samples=loss_samples, seed=seed, chunk=chunk)
    curves: list[Curve] = []
    size, interrupted = sizes[0], False
    try:
        for k, size in enumerate(sizes):

            def part(text: str, done: float, k: int = k) -> None:
                report(text, (k + done) / len(sizes))

            start = (curves[-1].best if curves else None) or runs.present_rate
            curves.append(scan(runs, size, repeats, start=start, window=window, report=part))
    except KeyboardInterrupt:
        interrupted = True
        if len(runs.known_rates(size, repeats)) > 2:
            curves.append(read(runs, size, repeats))
    except BaseException:
        with contextlib.suppress(Exception):  # the error that came first says more
            runs.put_back()
        raise
    after = runs.put_back()
    return LrRange(
        curves=tuple(curves),
        scaling=_scaling(curves, repeats),
        optimizer=type(workload.optimizer).__name__,
        present_rate=runs.present_rate,
        steps=steps,
        repeats=repeats,
        steps_taken=runs.count,
        before=runs.before,
        after=after,
        interrupted=interrupted,
        remarks=tuple(_remarks(curves, window)),
    )


def _scaling(curves: Sequence[Curve], repeats: int) -> Scaling | None:
    known = [c for c in curves if c.best is not None and c.best_log_error is not None]
    if len(known) < 3:
        return None
    return fit_scaling(
        [c.batch_size for c in known],
        [c.best or 0.0 for c in known],
        [c.best_log_error or 0.0 for c in known],
        degrees=repeats - 1,
    )


def _remarks(curves: Sequence[Curve], window: tuple[float, float] | None) -> list[str]:
    found = []
    for curve in curves:
        if len(set(curve.losses)) == 1:
            found.append(
                "The loss is the same at every rate: this optimizer takes no notice of it by now, or the "
                "weights do not change."
            )
        ends = (curve.learning_rates[0], curve.learning_rates[-1])
        if curve.best in ends:
            where = "the window that was given" if window else "the rates tried"
            found.append(
                f"Batch {curve.batch_size:,}: the best rate is at an end of {where}, and may lie beyond."
            )
    known = sum(curve.best is not None for curve in curves)
    if len(curves) > 1 and known < 3:
        found.append(
            f"A scaling rule needs a best rate at three or more batch sizes; there are {known}. More repeats "
            "show one where noise hides it."
        )
    return found


def _check(
    sizes: Sequence[int],
    steps: int,
    repeats: int,
    window: tuple[float, float] | None,
    loss_samples: int,
    seed: int,
) -> None:
    for name, value, least in (
        ("batch_sizes", min(sizes), 1),
        ("steps", steps, 1),
        ("repeats", repeats, 2),
        ("loss_samples", loss_samples, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InvalidArgumentError(f"{name}={value} must be at least {least}")
    if window is not None and not 0 < window[0] < window[1] < float("inf"):
        raise InvalidArgumentError(f"window={window} must be two rates, 0 < low < high")
