"""The section on a plan of `gradstats advise`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradstats.loggers.reading import number
from gradstats.words import readable
from gradstats.workbench.report.figures import Section, Table
from gradstats.workbench.report.inputs import Input

__all__ = ["plan"]

# Entries of a plan that are said in other words: by key, what they are called.
NAMES = {
    "batch_size": "batch size",
    "micro_batch_size": "micro-batch size",
    "accumulation_steps": "micro-batches a step, on each rank",
    "world_size": "ranks",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "warmup_steps": "steps of warm-up",
    "steps": "steps",
    "samples": "samples",
    "epochs": "epochs",
    "hours": "hours",
    "price": "price",
}


def plan(given: Input) -> Section:
    section = Section("plan", "Plan", "What gradstats advise makes of the measurements.")
    found = given.content.get("plan")
    found = found if isinstance(found, Mapping) else {}
    rows = [[name, _text(found[key])] for key, name in NAMES.items() if found.get(key) is not None]
    sources = given.content.get("sources")
    said = [str(source) for source in sources] if isinstance(sources, list) else []
    caption = f"It rests on {'; '.join(said)}." if said else ""
    section.add(Table(["", "value"], rows, caption=caption))
    return section


def _text(value: object) -> str:
    if isinstance(value, float):
        return readable(number(value)) if math.isfinite(value) else "–"
    return f"{value:,}" if isinstance(value, int) else str(value)
