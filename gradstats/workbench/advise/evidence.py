"""What was measured, from result files and logs: the numbers that a plan rests on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, whole
from gradstats.loggers import Logged, read_log
from gradstats.step_time import StepTime
from gradstats.words import counted
from gradstats.workbench import saved
from gradstats.workbench.advise.overfitting import Curve

__all__ = [
    "KINDS",
    "Evidence",
    "RatePoint",
    "gather",
    "of_content",
    "of_log",
    "of_target",
    "with_present",
]

KINDS = ("measure", "vram", "lr_range", "critical", "sweep")
LOGS = (".jsonl", ".ndjson")
VALIDATION = ("validation_loss", "val_loss", "eval_loss", "valid_loss")  # under which logs keep it


@dataclass(frozen=True)
class RatePoint:
    """A learning rate that a range test suggests at a batch size, and the range it lies in."""

    batch_size: int
    suggested: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evidence:
    """All that is known; None and empty where it is not. Batch sizes are in samples.

    `noise`: the noise scale, in samples. `batch_size`, `learning_rate`, `optimizer`, `betas`: those of the
    training that was measured, on `world_size` processes. `critical`: the critical batch over the noise
    scale. `largest`: samples that fit a device at once, with a margin. `rates`, and how they grow with the
    batch: ∝ B to the `exponent`, or, where they saturate, ∝ 1/(1 + `rate_noise`/B). `batch_norm`: names of
    BatchNorm layers, None where there are none or it is not known. `curves`: losses over trainings, those
    of one kind (other seeds) together. `sweep`: validation losses at the end by (batch size, learning rate).
    `sources`: what came from where, in words.
    """

    noise: NoiseScale | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    optimizer: str | None = None
    betas: tuple[float, ...] | None = None
    data_samples: int | None = None
    timing: StepTime | None = None
    world_size: int | None = None
    critical: float | None = None
    largest: int | None = None
    rates: tuple[RatePoint, ...] = ()
    exponent: float | None = None
    rate_noise: float | None = None
    batch_norm: tuple[str, ...] | None = None
    curves: tuple[tuple[Curve, ...], ...] = ()
    sweep: Mapping[tuple[int, float], Sequence[float]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def joined(self, other: Evidence) -> Evidence:
        """Both; where they know the same, `other` counts. Curves and sources of both are kept."""
        later = {
            name: value
            for name in self.__dataclass_fields__
            if (value := getattr(other, name)) not in (None, (), {})
        }
        both = {
            name: (*getattr(self, name), *getattr(other, name)) for name in ("curves", "sources")
        }
        return replace(self, **{**later, **both})


def gather(paths: Sequence[Path]) -> Evidence:
    """From files of ``gradstats measure``, ``vram``, ``lr-range``, ``critical`` and ``sweep``, and logs.

    A file whose name ends in .jsonl or .ndjson is a log. Of several files that know the same thing, the
    later counts. Warns of a log's lines that hold no row. Raises InvalidArgumentError where a file cannot be
    read, or holds something else.
    """
    found = Evidence()
    for path in paths:
        if path.suffix in LOGS:
            log = read_log(path)
            lines = f"{path}: {counted(log.spoilt, 'line')} without a row (cut short, or no JSON)"
            if not log.rows:
                seen = f"{lines}, and no other" if log.spoilt else f"{path} is empty"
                raise InvalidArgumentError(f"{seen}; is it a log of gradstats.Log?")
            if log.spoilt:
                warnings.warn(f"{lines} passed over", stacklevel=2)
            found = found.joined(of_log(log, path.name))
            continue
        content = saved.read(path, *KINDS)
        kind = str(content["kind"]).removeprefix("gradstats ")
        try:
            found = found.joined(of_content(kind, content, path.name))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(
                f"{path} lacks what a result of gradstats {kind} holds ({type(error).__name__}: "
                f"{error}); was "
                "it changed by hand, or written by another version?"
            ) from error
    return found


def of_content(kind: str, content: Mapping[str, Any], name: str) -> Evidence:
    """From the object in a result file of one of KINDS."""
    made = {
        "measure": _measure,
        "vram": _vram,
        "lr_range": _rates,
        "critical": _critical,
        "sweep": _sweep,
    }[kind](content)
    return replace(made, sources=tuple(f"{name}: {said}" for said in made.sources))


def _measure(content: Mapping[str, Any]) -> Evidence:
    noise = NoiseScale.from_dict(content["noise_scale"])
    tokens = content.get("tokens_per_sample")
    if tokens:
        noise = noise.per(tokens)
    timing, betas = content.get("timing"), content.get("betas")
    said = [str(noise)]
    return Evidence(
        noise=noise,
        batch_size=content["batch_size"],
        learning_rate=content.get("learning_rate"),
        optimizer=content.get("optimizer"),
        betas=tuple(betas) if betas else None,
        data_samples=content.get("data_samples"),
        timing=StepTime.from_dict(timing) if timing else None,
        batch_norm=tuple(content.get("batch_norm") or ()) or None,
        sources=tuple(said),
    )


def _vram(content: Mapping[str, Any]) -> Evidence:
    largest = content.get("recommended")
    if not largest:
        return Evidence(sources=("no micro-batch was found to fit",))
    return Evidence(largest=int(largest), sources=(f"{largest:,} samples fit a device at once",))


def _rates(content: Mapping[str, Any]) -> Evidence:
    points = [
        RatePoint(int(c["batch_size"]), float(c["suggested"]), c.get("low"), c.get("high"))
        for c in content["curves"]
        if c.get("suggested")
    ]
    said = [f"learning rate {p.suggested:.3g} at a batch of {p.batch_size:,}" for p in points]
    scaling = content.get("scaling") or {}
    exponent = noise = None
    if scaling.get("rule") == "saturating" and scaling.get("noise_scale"):
        noise = float(scaling["noise_scale"])
        said.append(f"learning rates saturate at batches of {noise:.3g}, as measured")
    elif scaling.get("rule") is not None:  # None: the data cannot tell
        exponent = scaling.get("exponent")
    if exponent is not None:
        said.append(f"learning rates grow with the batch to the power {exponent:.2f}, as measured")
    return Evidence(
        rates=tuple(points), exponent=exponent, rate_noise=noise, sources=("; ".join(said),)
    )


def _critical(content: Mapping[str, Any]) -> Evidence:
    size, noise = float(content["critical_batch_size"]), content.get("noise_scale")
    said = f"critical batch size {size:,.0f}, by branches"
    factor = content.get("calibration")
    factor = factor["value"] if isinstance(factor, Mapping) else factor
    found = Evidence(batch_size=content.get("batch_size"), sources=(said,))
    if noise is not None and factor:
        return replace(found, noise=NoiseScale.from_dict(noise), critical=float(factor))
    # The branches alone: their critical size stands where the noise scale would.
    low, high = content.get("low"), content.get("high")
    alone = NoiseScale(
        size, float(low or 0.0), math.inf if high is None else float(high),
        float(content.get("confidence", 0.9)), 0, 1, 0, math.nan, math.nan,
        note="the critical batch size by branches, in the place of a noise scale",
    )  # fmt: skip
    return replace(found, noise=alone)


def _sweep(content: Mapping[str, Any]) -> Evidence:
    groups: dict[tuple[int, float], list[Mapping[str, Any]]] = {}
    for trial in content["trials"]:
        groups.setdefault((trial["batch_size"], trial["learning_rate"]), []).append(trial)
    curves, ends = [], {}
    for (size, rate), trials in groups.items():
        name = f"batches of {size:,} at {rate:.3g}"
        curves.append(tuple(_curve(name, trial.get("curve") or (), "samples") for trial in trials))
        known = [v for t in trials if (v := t.get("validation_loss")) is not None]
        if known:
            ends[size, rate] = known
    held = [tuple(curve for curve in group if curve.at) for group in curves]
    evaluated = tuple(group for group in held if group)
    return Evidence(curves=evaluated, sweep=ends, sources=(f"{len(content['trials'])} trainings",))


def of_log(log: Logged, name: str) -> Evidence:
    """From what `gradstats.Log` wrote."""
    curve, about = _curve(name, log.rows, "step"), log.about
    said = f"{name}: {len(log.rows)} rows"
    found = Evidence(curves=((curve,),) if curve.at else (), sources=(said,))
    noise, size = log.noise_scale(), log.batch_size
    if noise is None:
        return found
    if about.tokens_per_sample:
        noise = noise.per(about.tokens_per_sample)
        ranks = log.world_size or 1
        each = 0 if size is None else max(1, round(size / about.tokens_per_sample / ranks))
        size = each * ranks or None
    return replace(
        found,
        noise=noise,
        batch_size=size,
        learning_rate=log.present("learning_rate"),
        optimizer=about.optimizer,
        timing=log.timing,
        world_size=log.world_size,
        sources=(*found.sources, f"{name}: {noise}"),
    )


def _curve(name: str, rows: Sequence[Mapping[str, Any]], at: str) -> Curve:
    """The evaluations among them; training losses are means since the evaluation before."""
    key = next((key for key in VALIDATION if any(row.get(key) is not None for row in rows)), None)
    places: list[float] = []
    train: list[float] = []
    held: list[float] = []
    since: list[float] = []
    if key is None:
        return Curve(name, places, train, held)
    for row in rows:
        if row.get("loss") is not None:
            since.append(float(row["loss"]))
        if row.get(key) is not None:
            places.append(float(row.get(at, len(places))))
            held.append(float(row[key]))
            train.append(math.fsum(since) / len(since) if since else math.nan)
            since = []
    return Curve(name, places, train, held)


def of_target(target: str) -> Evidence:
    """From the user's training, `module:factory`: its data, optimizer and BatchNorm layers; no "
    "step is taken."""
    from gradstats.workbench.workload import load

    made = load(target)
    group = made.optimizer.param_groups[0]  # type: ignore[union-attr]
    return Evidence(
        batch_size=made.batch_size,
        learning_rate=float(group["lr"]),
        optimizer=type(made.optimizer).__name__,
        betas=group.get("betas"),
        data_samples=made.num_samples,
        batch_norm=made.batch_norm_layers or None,
        sources=(f"{target}: {made.num_samples:,} samples, {type(made.optimizer).__name__}",),
    )


def with_present(
    evidence: Evidence,
    *,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    data_samples: int | None = None,
    largest: int | None = None,
) -> Evidence:
    """The evidence with other present settings, where they are given."""
    given = {
        "batch_size": None if batch_size is None else whole("batch_size", batch_size),
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "data_samples": None if data_samples is None else whole("data_samples", data_samples),
        "largest": None if largest is None else whole("max_micro_batch_size", largest),
    }
    return replace(evidence, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
