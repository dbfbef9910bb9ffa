"""From files to a report: which sections there are, in which order."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.workbench.report import machine, noise, planned, plans, runs, trade_off, tuning
from gradstats.workbench.report.advice_of import (
    Basis,
    basis_of_measure,
    basis_of_run,
    memory_cap,
    runs_of,
)
from gradstats.workbench.report.embedded import Part, embed
from gradstats.workbench.report.figures import Figure, Mark, Section
from gradstats.workbench.report.findings import Verdict
from gradstats.workbench.report.inputs import Input, Run, guarded
from gradstats.workbench.report.remarks import Remark, remarks
from gradstats.workbench.report.verdict import verdict

__all__ = ["Report", "build"]

# Sections of one result file each, in the order of the report.
OF_RESULTS: dict[str, Callable[[Input], Section]] = {
    "sweep": plans.sweep,
    "critical": tuning.critical,
    "lr_range": tuning.lr_range,
    "vram": machine.memory,
    "bench": machine.bench,
}


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    made: str
    verdict: Verdict
    remarks: Sequence[Remark]
    sections: Sequence[Section]
    data: Sequence[Part]

    def to_dict(self) -> dict[str, Any]:
        """The verdict and what was found, without the figures' points."""
        return {
            "title": self.title,
            "verdict": asdict(self.verdict),
            "warnings": [asdict(remark) for remark in self.remarks],
            "sections": [
                {
                    "id": section.id,
                    "title": section.title,
                    "figures": [part.title for part in section.parts if isinstance(part, Figure)],
                }
                for section in self.sections
            ],
            "files": [
                {
                    "path": part.path,
                    "kind": part.kind,
                    "entries": part.entries,
                    "left_out": part.left_out,
                }
                for part in self.data
            ],
        }


def build(inputs: Sequence[Input], *, title: str | None = None) -> Report:
    """The report of what `read` gave.

    Raises InvalidArgumentError, which names the file, where a result does not hold what its kind says.
    """
    if not inputs:
        raise InvalidArgumentError("a report needs a file at least; name a log or a result")
    cap = memory_cap(inputs)
    trainings = runs_of(inputs)
    measured = [given for given in inputs if given.kind == "measure"]
    bases = [guarded(given, basis_of_measure) for given in measured]
    found = [basis for basis in bases if basis is not None]
    # The log of a measurement says the same again.
    known = {(basis.noise.value, basis.present) for basis in found}
    of_logs = [basis_of_run(run, cap) for run in trainings]
    found += [b for b in of_logs if b is not None and (b.noise.value, b.present) not in known]
    sections = [
        *_of_results(inputs, {"advise": planned.plan}),
        *_of_runs(trainings, found, measured, cap),
        *_of_results(inputs, OF_RESULTS),
        machine.environment(inputs),
    ]
    now = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    names = [given.name for given in inputs]
    heading = title or (
        " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
    )
    return Report(
        heading,
        f"{len(inputs)} file{'' if len(inputs) == 1 else 's'}, {now}",
        verdict(inputs, trainings, found),
        remarks(inputs, trainings, found),
        [section for section in sections if section.parts],
        embed(inputs),
    )


def _of_results(
    inputs: Sequence[Input], makers: Mapping[str, Callable[[Input], Section]]
) -> list[Section]:
    """The sections of result files, kind by kind."""
    sections = []
    for kind, make in makers.items():
        same = [given for given in inputs if given.kind == kind]
        for i, given in enumerate(same):
            section = guarded(given, make)
            if len(same) > 1:
                section.id, section.title = f"{section.id}-{i}", f"{section.title}: {given.name}"
            sections.append(section)
    return sections


def _of_runs(
    trainings: Sequence[Run], bases: Sequence[Basis], measured: Sequence[Input], cap: int | None
) -> list[Section]:
    marks = (
        [] if cap is None else [Mark("y", cap, f"micro-batch that fits: {cap:,}", stretch=False)]
    )
    layers = noise.shares(trainings)
    costs = Section("speed", "Speed and overhead")
    for given in measured:
        share, notes = noise.notes_of_layers(given.content.get("layers"))
        title = f"Share of tr Σ by layer, {given.name}"
        layers.add(noise.share_bars(title, share, notes))
        costs.add(*machine.overhead(given))
    if not measured:  # the log of a measurement says the same again
        for run in trainings:
            if run.about.timing is not None:
                costs.add(machine.step_time(run.about.timing.to_dict(), runs.of(run, trainings)))
    costs.add(runs.speed(trainings))
    return [
        noise.noise(trainings, marks),
        trade_off.trade_off(bases, cap),
        runs.loss(trainings),
        runs.summary(trainings),
        layers,
        runs.schedule(trainings),
        costs,
        runs.other_numbers(trainings),
    ]
