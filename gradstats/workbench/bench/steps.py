"""Whole training steps of the standard models: plain, with statistics, and with other tools'."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gradstats.errors import first_line
from gradstats.workbench.bench.checks import Monitored, Scheduled, check_gradstats, check_peer
from gradstats.workbench.bench.models import MODELS, Problem
from gradstats.workbench.bench.peers import PEERS, Refused, Step
from gradstats.workbench.bench.timing import Spread, interleave, ratios

__all__ = ["KINDS", "NOTES", "PLAIN", "Variant", "measure", "timed"]

PLAIN, KINDS = "plain", ("norms", "norms+moments")
LONGEST = 110  # letters of a refusal that a table shows
ADAPTED = {"gpt": {"batched_positions": True}}  # the same function, in a form that more tools take
NOTES = {
    "partial": "leaves out layers it does not know: its time is of less work",
    "adapted": "refuses the model as it is; runs a form with position ids per sample",
    "wrong": "its per-sample norms differ from gradstats'",
}


@dataclasses.dataclass
class Variant:
    """One way to statistics on one model: its seconds per step, and their ratio to the plain step's.

    `status`: "ok", "partial", "wrong" or "refused", with `note` saying more. `error`: of the squared
    norms, relative. `rounds`: seconds per step in each round.
    """

    name: str
    step: Callable[[], Any] | None = None
    status: str = "ok"
    note: str = ""
    error: float | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None
    rounds: tuple[float, ...] = ()

    @property
    def remark(self) -> str:
        if self.seconds is None:
            return f"{self.status}: {self.note}"
        remark = self.status if not self.note else f"{self.status}, {self.note}"
        return "" if remark == "ok" else remark

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {name: getattr(self, name) for name in ("status", "note", "error")}
        for name in ("seconds", "ratio"):
            spread = getattr(self, name)
            row[name] = None if spread is None else dataclasses.asdict(spread)
        return row


def peer(name: str, kind: str, forms: list[tuple[str, Problem]], record: Any) -> Variant:
    """The peer's variant, checked; on the first of the forms of the model that it takes."""
    found = Variant(f"{name} {kind}")
    for note, form in forms:
        try:
            step = PEERS[name](form, moments=kind == KINDS[1])
            status, error = check_peer(step, record)
        except Exception as refusal:
            if found.step is None:
                reason = str(refusal) if isinstance(refusal, Refused) else first_line(refusal)
                found.status, found.note = "refused", found.note or reason[:LONGEST]
            continue
        if found.step is None or status != "wrong":
            found.step, found.status, found.note, found.error = step, status, note, error
        if status != "wrong":
            break
    return found


def variants(
    model: str, peers: Sequence[str], tiny: bool, device: str
) -> tuple[list[Variant], dict[str, float]]:
    """All of a model, and how far gradstats is from the float64 truth, which is checked first."""
    problem = MODELS[model].make(tiny=tiny, device=device)
    forms = [("", problem)]
    if model in ADAPTED:
        adapted = MODELS[model].make(tiny=tiny, device=device, **ADAPTED[model])
        forms.append(("adapted", adapted))
    errors, record = check_gradstats(problem)
    rows = [Variant(PLAIN, Step(problem))]
    for i, kind in enumerate(KINDS):
        step = Monitored(problem, moments=bool(i))
        rows.append(Variant(f"gradstats {kind}", step, error=errors["norms"]))
    rows.append(Variant("gradstats norms+scheduler", Scheduled(problem), error=errors["norms"]))
    with warnings.catch_warnings():
        for message in ("(?i).*full backward hook.*", "(?i).*performance drop.*"):
            warnings.filterwarnings("ignore", message=message)
        rows += [peer(name, kind, forms, record) for kind in KINDS for name in peers]
    return rows, errors


def measure(
    model: str,
    rounds: int,
    peers: Sequence[str],
    *,
    tiny: bool = False,
    turn_seconds: float = 0.1,
    device: str = "cpu",
    say: Callable[[str], object] = lambda text: None,
) -> list[Variant]:
    """The variants of one of `MODELS`, timed in turns; `say` is told how exact gradstats is."""
    rows, errors = variants(model, peers, tiny, device)
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    say(f"{model}: gradstats against float64, relative: {shown}")
    return timed(rows, rounds, turn_seconds, device)


def timed(
    rows: list[Variant], rounds: int, turn_seconds: float, device: str = "cpu"
) -> list[Variant]:
    """The same rows with their times; each lets go of its step. The first is what ratios are to."""
    steps = {row.name: row.step for row in rows if row.step is not None}
    with warnings.catch_warnings():
        for message in ("(?i).*full backward hook.*", "(?i).*performance drop.*"):
            warnings.filterwarnings("ignore", message=message)
        seconds = interleave(steps, rounds=rounds, turn_seconds=turn_seconds, device=device)
    ratio = ratios(seconds, rows[0].name)
    for row in rows:
        if row.name in seconds:
            row.seconds, row.ratio = Spread.of(seconds[row.name]), ratio[row.name]
            row.rounds = tuple(seconds[row.name])
        row.step = None
    gc.collect()
    return rows
