"""The one sentence that a person needs, how sure it is, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from gradstats.words import readable
from gradstats.workbench.report import findings
from gradstats.workbench.report.advice_of import Basis
from gradstats.workbench.report.findings import Verdict
from gradstats.workbench.report.inputs import Input, Run, guarded
from gradstats.workbench.report.runs import duration, loss_at

__all__ = ["verdict"]

MOST_FACTS = 6
# What results say, the strongest evidence first.
OF_RESULTS: dict[str, Callable[[Input], Verdict | None]] = {
    "sweep": findings.swept,
    "critical": findings.critical,
    "lr_range": findings.rates,
    "vram": findings.memory,
    "bench": findings.speed,
}
# Facts that stand beside another finding's; the others are what that finding would have one do.
ALONGSIDE = {
    *("Noise scale", "Critical batch size", "Largest micro-batch", "Best plan by samples"),
    *("Learning rate, range test", "Measured step"),
}


def verdict(inputs: Sequence[Input], runs: Sequence[Run], bases: Sequence[Basis]) -> Verdict:
    """From the strongest evidence; what the rest says follows as reasons and facts.

    In order: a plan of `advise`, the noise scale with the narrowest interval, a sweep, a critical
    batch size, a learning-rate range, memory, speed.
    """
    found = [
        made
        for given in inputs
        if given.kind == "advise" and (made := guarded(given, findings.advised))
    ]
    by_noise = [findings.by_noise(basis, len(bases) > 1) for basis in sorted(bases, key=_width)[:1]]
    if found and by_noise:  # a plan was made of what the noise scale says, which is as sure as that
        sure = f"{found[0].sure} {by_noise[0].sure}"
        found = [replace(found[0], sure=sure, level=by_noise[0].level), *found[1:]]
        by_noise = [replace(by_noise[0], headline="")]
    found += by_noise
    for kind, finding in OF_RESULTS.items():
        found += [
            made for given in inputs if given.kind == kind and (made := guarded(given, finding))
        ]
    if not found:
        names = ", ".join(given.name for given in inputs)
        return Verdict(
            "Nothing can be advised from these files yet.",
            f"{names}: no noise scale, plan or limit that could be acted on.",
            "poor",
            reasons=_compared(runs),
        )
    first, rest = found[0], found[1:]
    facts = [*first.facts]
    for fact in (fact for finding in rest for fact in finding.facts if fact.name in ALONGSIDE):
        facts += [] if fact.name in [known.name for known in facts] else [fact]
    return replace(
        first,
        facts=facts[:MOST_FACTS],
        reasons=[*first.reasons, *_compared(runs), *(f.headline for f in rest if f.headline)],
    )


def _width(basis: Basis) -> float:
    noise = basis.noise
    known = math.isfinite(noise.value) and noise.low > 0
    return noise.high / noise.low if known else math.inf


def _compared(runs: Sequence[Run]) -> list[str]:
    """Which of several trainings was ahead at equal samples and equal time."""
    said = []
    for key, at in (("samples", "At {} samples"), ("seconds", "After {}")):
        ends = [run.last(key) for run in runs]
        if len(runs) < 2 or not all(map(math.isfinite, ends)):
            continue
        reached = {run.name: loss_at(run, key, min(ends)) for run in runs}
        end = duration(min(ends)) if key == "seconds" else f"{min(ends):,.0f}"
        if all(map(math.isfinite, reached.values())):
            order = sorted(reached, key=lambda name: reached[name])
            parts = [f"{name} {readable(reached[name])}" for name in order]
            said.append(f"{at.format(end)} the smoothed losses were: {', '.join(parts)}")
    return said
