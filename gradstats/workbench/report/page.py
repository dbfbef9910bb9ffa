"""The report as one HTML file: no request leaves it, and nothing in it runs but its own script."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from typing import Any

import gradstats
from gradstats.errors import GradStatsError
from gradstats.words import readable
from gradstats.workbench.report.drawing import Drawing, draw
from gradstats.workbench.report.embedded import files_table, in_script
from gradstats.workbench.report.figures import Bars, Figure, Section, Table
from gradstats.workbench.report.making import Report
from gradstats.workbench.report.thinning import kept_indices

__all__ = ["render"]

NUMBERS = 20  # rows of each line in the table under a figure


def render(report: Report) -> str:
    """The page. Raises GradStatsError where jinja2 is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise GradStatsError(
            f"the report needs jinja2 ({error}); run `pip install 'gradstats[report]'`"
        ) from error
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawings: list[Drawing] = []
    sections = [_section(section, drawings) for section in report.sections]
    parts = [vars(part) | {"json": Markup(part.json)} for part in report.data]
    return environment.from_string(_file("page.html")).render(
        page={
            "title": f"gradstats report: {report.title}",
            "heading": report.title,
            "made": report.made,
            "foot": f"Made by gradstats {gradstats.__version__}. This file opens anywhere, by itself.",
        },
        verdict=report.verdict,
        remarks=report.remarks,
        sections=sections,
        data={
            "words": "What this page was made of, kept in it as JSON; long lists are thinned evenly.",
            "files": files_table(report.data),
            "parts": parts,
        },
        figures_json=Markup(in_script([drawing.data for drawing in drawings])),
        style=Markup(_file("style.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _section(section: Section, drawings: list[Drawing]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in section.parts:
        if isinstance(part, Figure):
            drawing = draw(part)
            drawings.append(drawing)
            shown = vars(drawing) | {"numbers": _numbers(part)}
            parts.append({"kind": "figure", "drawing": shown})
        elif isinstance(part, Bars):
            parts.append({"kind": "bars", "bars": part})
        else:
            parts.append({"kind": "table", "table": part})
    _place(parts)
    return vars(section) | {"parts": parts}


def _place(parts: list[dict[str, Any]]) -> None:
    """Two columns; what has many itself takes both, and so does a part that would stand alone."""
    alone: dict[str, Any] | None = None
    for part in parts:
        table = part.get("table")
        bars = part.get("bars")
        part["wide"] = bool(bars and bars.note_heading)
        if table is not None:
            part["wide"] = len(table.headings) > 2 or table.folded
        if part["wide"]:
            alone, left = None, alone
        else:
            alone, left = (part, None) if alone is None else (None, None)
        if left is not None:
            left["wide"] = True
    if alone is not None:
        alone["wide"] = True


def _numbers(figure: Figure) -> Table:
    """A figure's points as text, thinned where they are many."""
    rows, left_out = [], 0
    banded = any(line.low is not None or line.high is not None for line in figure.lines)
    for line in figure.lines:
        if line.style == "faint":
            continue
        kept = kept_indices(len(line.x), NUMBERS)
        left_out += len(line.x) - len(kept)
        for i in kept:
            row = [line.name, _text(line.x[i]), _text(line.y[i])]
            if banded:
                row += [_text(end[i]) if end is not None else "–" for end in (line.low, line.high)]
            rows.append(row)
    headings = ["line", figure.x.label, figure.y.label, *(["low", "high"] if banded else [])]
    caption = f"{left_out:,} more points are left out here, evenly." if left_out else ""
    return Table(headings, rows, caption=caption)


def _text(value: float) -> str:
    if math.isinf(value):
        return "no end"
    return "–" if math.isnan(value) else readable(float(value))
