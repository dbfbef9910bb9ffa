"""What a log says of the training now, and what to look at. Numbers and words only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from gradstats.batch_advice import BatchSizeAdvice
from gradstats.estimators import NoiseScale
from gradstats.loggers import About, Logged
from gradstats.words import sizes

__all__ = ["State", "number", "state_of"]

RECENT = 20  # rows behind the speed
PATIENCE = 5.0  # times the usual time between rows after which a log counts as stalled
FEWEST_SECONDS = 30.0  # before that
SHARE = "layer_share/"
NOTHING = About()

Row = dict[str, Any]


@dataclass(frozen=True)
class State:
    """The last row and what follows from all of them.

    `age`: seconds since the log was written to; `samples_per_second` over the last rows; `layers`: shares
    of tr Σ by parameter, the largest first; `advice`: what `gradstats.recommend` makes of it
    (`BatchSizeAdvice.to_dict()`); `warnings`: sentences by what they are about. None where not known.
    """

    rows: int
    last: Mapping[str, Any]
    samples_per_second: float | None
    age: float | None
    layers: Mapping[str, float]
    advice: Mapping[str, Any] | None
    warnings: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)


def state_of(
    rows: Sequence[Row],
    *,
    about: About = NOTHING,
    age: float | None = None,
    spoilt: int = 0,
    restarts: int = 0,
    resumed: int = 0,
) -> State:
    """The state of a log from its rows (see `Follower`)."""
    last, log = rows[-1] if rows else {}, Logged(rows, about)
    noise, advice = log.noise_scale(), log.recommend()
    shares = {
        key.removeprefix(SHARE): share
        for key in last
        if key.startswith(SHARE) and (share := number(last, key)) is not None
    }
    return State(
        rows=len(rows),
        last=last,
        samples_per_second=speed(rows),
        age=age,
        layers=dict(sorted(shares.items(), key=lambda item: -item[1])),
        advice=None if advice is None else advice.to_dict(),
        warnings=_file(rows, age, spoilt, restarts, resumed) | _training(last, noise, advice),
    )


def number(row: Row, key: str) -> float | None:
    """A row's finite number, or None."""
    value = row.get(key)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None  # type: ignore[arg-type]


def speed(rows: Sequence[Row]) -> float | None:
    """Samples per second over the last rows."""
    known = [
        (s, t)
        for row in rows[-RECENT:]
        if (s := number(row, "samples")) is not None and (t := number(row, "seconds")) is not None
    ]
    if len(known) < 2 or known[-1][1] <= known[0][1]:
        return None
    return (known[-1][0] - known[0][0]) / (known[-1][1] - known[0][1])


def _file(
    rows: Sequence[Row], age: float | None, spoilt: int, restarts: int, resumed: int
) -> dict[str, str]:
    found = {}
    times = [t for row in rows[-RECENT:] if (t := number(row, "seconds")) is not None]
    gaps = [b - a for a, b in pairwise(times) if b > a]
    usual = statistics.median(gaps) if gaps else 0.0
    if rows and age is not None and age > max(PATIENCE * usual, FEWEST_SECONDS):
        came = f" (rows came every {_duration(usual)})" if gaps else ""
        found["stalled"] = (
            f"no new row for {_duration(age)}{came}: the training has ended, or hangs"
        )
    if spoilt:
        lines = _count(spoilt, "line")
        found["spoilt"] = f"{lines} of the file hold no row, and were passed over"
    if restarts:
        found["restarted"] = f"the file began anew {_count(restarts, 'time')}"
    if resumed:
        found["resumed"] = f"the training went back to an earlier step {_count(resumed, 'time')}"
    return found


def _training(
    last: Row, noise: NoiseScale | None, advice: BatchSizeAdvice | None
) -> dict[str, str]:
    if not last:
        return {}
    found = {}
    if "loss" in last and number(last, "loss") is None:
        found["diverged"] = "the loss is not a number: the training has diverged"
    found |= _noise(noise, advice)
    coverage = number(last, "coverage")
    if coverage is not None and coverage < 1:
        found["coverage"] = (
            f"the noise scale speaks for {100 * coverage:.3g}% of the trainable parameters only "
            "(coverage.missing of the monitor's record says why)"
        )
    skipped = number(last, "num_skipped")
    if skipped:
        found["skipped"] = (
            f"{_count(int(skipped), 'step')} left out of the noise scale: not finite, or of fewer than "
            "two samples"
        )
    return found


def _noise(noise: NoiseScale | None, advice: BatchSizeAdvice | None) -> dict[str, str]:
    """What the interval says of the batch size that is used."""
    if noise is None:
        return {"noise": "this log holds no noise scale: is it one of gradstats.Log?"}
    if noise.uncalibrated:
        text = "the noise scale is a proxy without usable calibration, and not to act on"
        return {"uncertain": text}
    if not noise.actionable:
        text = "the noise scale's interval is too wide to act on: measure more steps"
        return {"uncertain": text}
    if advice is None:
        return {}
    now, low, high = advice.present.batch_size, advice.low, advice.high or math.inf
    if low <= now <= high:
        return {}
    side, pays = ("below", "a larger one") if now < low else ("above", "a smaller one")
    return {
        "batch": f"the batch of {now:,} is {side} what the noise scale's interval advises, "
        f"{sizes(low, advice.high)}: {pays} takes fewer {'steps' if now < low else 'samples'} at little "
        "cost (`gradstats advise`)"
    }


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
