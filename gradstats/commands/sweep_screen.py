"""What `gradstats sweep` shows: how far it is, and what it found."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gradstats.commands.progress import Progress
from gradstats.estimators import readable
from gradstats.terminal import console_and_table
from gradstats.workbench.sweep.run import Sweep
from gradstats.workbench.sweep.settings import Settings
from gradstats.workbench.sweep.trial import Trial

__all__ = ["Screen", "show"]

LOSSES = {
    "final_loss": "final loss",
    "validation_loss": "validation",
    "gap": "gap",
    "seconds": "seconds",
    "noise_scale": "noise scale",
}
MINIMA = {
    "gradient_variance": "gradient variance",
    "sharpness_full": "ε-sharpness, %",
    "sharpness_subspace": "in a subspace, %",
    "top_eigenvalue": "top eigenvalue",
}


class Screen:
    """What a sweep reports, as progress on standard error."""

    def __init__(self, settings: Settings) -> None:
        self._progress = Progress("sweep")
        self._trials = len(settings.plans) * settings.seeds
        self._total = settings.seeds * sum(plan.samples for plan in settings.plans)
        self._samples: dict[str, int] = {}
        self._ended: set[str] = set()

    def __enter__(self) -> Screen:
        self._progress.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)

    def __call__(self, trial: Trial, news: Mapping[str, Any]) -> None:
        if "last" in news:
            then = "given up" if news["last"] else "tried once more"
            print(f"{trial.name} failed and is {then}: {news['why']}", file=sys.stderr, flush=True)
            return
        self._samples[trial.name] = trial.plan.samples if "ok" in news else news["samples"]
        if "ok" in news:
            self._ended.add(trial.name)
        text = f"{len(self._ended)} of {self._trials} trials, {trial.name}"
        for name in ("validation_loss", "loss"):
            if news.get(name) is not None:
                text += f" {name.replace('_', ' ')} {readable(news[name])}"
                break
        self._progress(text, sum(self._samples.values()) / self._total)


def show(found: Sweep) -> None:
    """The result, for people."""
    console, make_table = console_and_table()
    if found.interrupted:
        console.print(
            "Interrupted: what follows was measured until then; the same command goes on."
        )
    for columns in (LOSSES, MINIMA):
        shown = {k: v for k, v in columns.items() if any(_known(row, k) for row in found.summary)}
        if shown:
            console.print(_table(make_table, found.summary, shown))
    for verdict in found.verdicts:
        console.print(str(verdict))
    for text in (*_variance(found.variance), *_steps(found.steps_to_target)):
        console.print(text)
    for remark in found.remarks:
        console.print(f"Note: {remark}.")


def _table(make_table: Any, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Any:
    table = make_table("plan", "rate", *columns.values())
    for row in rows:
        rate = "–" if row["learning_rate"] is None else readable(row["learning_rate"])
        table.add_row(row["plan"], rate, *(_cell(row.get(key)) for key in columns))
    return table


def _known(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return value is not None and (not isinstance(value, Mapping) or value["mean"] is not None)


def _cell(value: Any) -> str:
    """A number, or a mean with half the width of its interval."""
    if value is None or (isinstance(value, Mapping) and value["mean"] is None):
        return "–"
    if not isinstance(value, Mapping):
        return readable(value)
    text = readable(value["mean"])
    if value["high"] is not None:
        text += f" ± {readable(value['high'] - value['mean'])}"
    return text


def _variance(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    points, at = found["points"], found["at"]
    where = f"at the weights of {at['plan']} after {at['step']:,} steps"
    text = f"Variance of the mean gradient, {where}: "
    text += "; ".join(f"{readable(p['direct'])} at {p['batch_size']:,}" for p in points)
    if found["exponent"] is not None:
        ends = f"{found['low']:.3f} to {found['high']:.3f}"
        text += f". It goes with B to the power {found['exponent']:.3f} (90% interval {ends})"
        text += f", at most {100 * found['worst']:.2g}% from c/B"
    ratios = [p["ratio"] for p in points if p["ratio"] is not None]
    if ratios:
        off = max(abs(ratio - 1) for ratio in ratios)
        text += f"; between batches and the monitor's tr Σ/B agree to {100 * off:.2g}%"
    return [text + "."]


def _steps(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    name = found["measure"].replace("_", " ")
    text = f"Steps to a {name} of {readable(found['target'])}: "
    text += "; ".join(f"{readable(p['steps'])} at {p['batch_size']:,}" for p in found["points"])
    off = f"{100 * found['worst_relative']:.2g}%"
    if not found["determined"]:
        return [text + f". They do not show where the curve bends (worst deviation {off})."]
    return [
        text
        + f". On (S/S_min - 1)(E/E_min - 1) = 1 with S_min {readable(found['steps_min'])} steps, "
        f"E_min {readable(found['samples_min'])} samples and a critical batch of "
        f"{readable(found['critical_batch'])}, up to {off} off."
    ]
