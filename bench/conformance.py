"""Right, or refused: every situation of situations.py, asked of gradstats and of its peers.

    python bench/conformance.py [--only NAME ...] [--no-peers] [--json FILE] [--markdown]

A cell holds what a tool does with a situation: `exact` (each parameter's per-sample squared norms
agree with float64 autograd, one sample at a time), `refused` (an error, or a statement that a
parameter is not covered), `wrong` (numbers that are off), or `n/a`. A peer that is not installed is
left out. Without --only and --no-peers the result goes to results/conformance.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from checkout import RESULTS
from conformance_tools import TOOLS, Norms, Tool
from situation_parts import Situation
from situations import SITUATIONS
from torch import Tensor, nn

from gradstats.workbench.bench.peers import PACKAGES, Refused, first_line
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment


@dataclass(frozen=True)
class Cell:
    verdict: str
    note: str = ""
    error: float | None = None  # relative, of the worst parameter
    other_way: bool = False  # wrong, where another of the tool's ways is exact

    def shown(self) -> str:
        if self.verdict == "wrong":
            return "**wrong** ¹" if self.other_way else "**wrong**"
        return self.verdict


def truth(situation: Situation, model: nn.Module, batch: Tensor) -> Norms:
    """Squared norms by parameter, and of all: float64 autograd, one sample at a time."""
    model = copy.deepcopy(model).double()
    for name in situation.frozen:
        model.get_parameter(name).requires_grad_(False)
    wide = batch.double() if batch.is_floating_point() else batch
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {n: [] for n in named}
    for i in range(situation.count(batch)):
        model.zero_grad()
        situation.one(model, situation.sample(wide, i), wide).backward()
        for name, p in named.items():
            g = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            found[name].append(g.square().sum())
    norms = {n: torch.stack(g) if g else torch.zeros(0).double() for n, g in found.items()}
    norms = {n: g[situation.measured] for n, g in norms.items()}
    return {**norms, "all": torch.stack(list(norms.values())).sum(0)}


def judge(situation: Situation, found: Norms, true: Norms) -> Cell:
    """Raises Refused where the parameters' norms cannot be joined."""
    if not situation.exists:
        return Cell("wrong", "a number, where the samples have no gradients of their own")
    found = {n: g.detach().double() for n, g in found.items()}
    sizes = {len(g) for g in found.values()}
    if len(sizes) > 1:
        raise Refused(f"norms of {sorted(sizes)} samples, depending on the parameter")
    if sizes != {len(true["all"])}:
        return Cell("wrong", f"norms of {sizes.pop()} samples, where there are {len(true['all'])}")
    if "all" not in found:
        found["all"] = torch.stack(list(found.values())).sum(0)
    if not len(true["all"]):
        return Cell("exact")
    missing = [n for n, g in true.items() if n not in found and g.any()]
    if missing and len(found) > 1:
        raise Refused(f"nothing about {', '.join(missing)}")
    least = 1e-6 * true["all"].max().clamp_min(1e-300)
    worst = [(0.0, "")]
    for name, g in found.items():
        scale = true[name].max().clamp_min(least)
        gaps = [(g - true[name] * k).abs().max() / (scale * k) for k in situation.accepted]
        error = float(torch.stack(gaps).min())
        worst.append((float("inf") if error != error else error, name))
    error, name = max(worst)
    if error <= situation.tolerance:
        return Cell("exact", error=error)
    return Cell("wrong", f"off by {error:.1e} in {name}", error)


def run(
    kind: type[Tool], situation: Situation, model: nn.Module, batch: Tensor, true: Norms
) -> Cell:
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tool = kind(situation, model)
            with tool.active():
                situation.script(tool, batch.detach().clone(memory_format=torch.preserve_format))
            found = judge(situation, tool.found(), true)
        for text in (str(warning.message) for warning in said):
            if tool.statement and tool.statement in text:
                return Cell("refused", f"a warning: {text[:90]}")
        return found
    except Exception as error:
        return Cell(
            "refused", (str(error) if isinstance(error, Refused) else first_line(error))[:160]
        )


def cell(name: str, situation: Situation, model: nn.Module, batch: Tensor, true: Norms) -> Cell:
    """What the first of the tool's ways that gives numbers gives."""
    if name == "torch.func" and not situation.functional:
        return Cell("n/a", "there are no such calls")
    cells = [run(kind, situation, model, batch, true) for kind in TOOLS[name]]
    chosen = next((c for c in cells if c.verdict != "refused"), cells[0])
    if chosen.verdict == "wrong" and any(c.verdict == "exact" for c in cells):
        chosen = replace(chosen, other_way=True)
    return chosen


def row(name: str, names: list[str]) -> dict[str, Cell]:
    situation = SITUATIONS[name]
    torch.manual_seed(1)
    model = situation.make().to(situation.dtype)
    batch = situation.data(situation.batch)
    batch = batch.to(situation.dtype) if batch.is_floating_point() else batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        true = truth(situation, model, batch)
    return {tool: cell(tool, situation, model, batch, true) for tool in names}


LEGEND = "¹ BatchL2Grad; the norms of BatchGrad are exact."
Rows = dict[str, dict[str, Cell]]


def counts(rows: Rows, tool: str) -> list[int]:
    """How many cells are exact, refused and wrong."""
    verdicts = [cells[tool].verdict for cells in rows.values()]
    return [verdicts.count(v) for v in ("exact", "refused", "wrong")]


def markdown(rows: Rows, grouped: bool) -> str:
    """One line per situation, or per way in which the tools differ."""
    tools = list(next(iter(rows.values())))
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows.items():
        key = tuple(c.shown() for c in cells.values())
        lines.setdefault(key if grouped else (*key, name), []).append(SITUATIONS[name].text)
    text = [f"| situation | {' | '.join(tools)} |", "|---" * (1 + len(tools)) + "|"]
    # Where most agree first, what gradstats does not take last.
    order = sorted(lines, key=lambda k: (k[0] != "exact", -k.count("exact"))) if grouped else lines
    for key in order:
        texts = lines[key]
        text.append(f"| {'; '.join(texts)} | {' | '.join(key[: len(tools)])} |")
    numbers = [" / ".join(map(str, counts(rows, tool))) for tool in tools]
    text.append(f"| exact / refused / wrong, of {len(rows)} | {' | '.join(numbers)} |")
    return "\n".join(text)


def notes(rows: Rows) -> str:
    """Why each cell is not exact, one line each."""
    return "\n".join(
        f"- {SITUATIONS[name].text}: {tool} {c.shown()}: {c.note}"
        for name, cells in rows.items()
        for tool, c in cells.items()
        if c.verdict in ("refused", "wrong")
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SITUATIONS), metavar="NAME")
    parser.add_argument("--no-peers", action="store_true", help="gradstats alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="the README's table")
    args = parser.parse_args(argv)
    tools = ["gradstats"] if args.no_peers else [t for t in TOOLS if find_spec(TOOLS[t][0].needs)]
    if len(tools) < len(TOOLS) and not args.no_peers:
        print(f"not installed: {', '.join(t for t in TOOLS if t not in tools)}", file=sys.stderr)
    rows = {name: row(name, tools) for name in args.only or SITUATIONS}
    if args.markdown:
        print(markdown(rows, grouped=True))
    else:
        body = [[SITUATIONS[n].text, *(c.verdict for c in r.values())] for n, r in rows.items()]
        print(table(["situation", *tools], body))
        for tool in tools:
            print("{}: {} exact, {} refused, {} wrong".format(tool, *counts(rows, tool)))
    whole = len(tools) == len(TOOLS) and not args.only
    report = {
        "environment": environment("gradstats", *PACKAGES),
        "situations": {
            n: {"text": SITUATIONS[n].text, "cells": {t: asdict(c) for t, c in r.items()}}
            for n, r in rows.items()
        },
    }
    path = args.json or (RESULTS / "conformance.json" if whole else None)
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    if path and whole:
        versions = ", ".join(f"{n} {v}" for n, v in report["environment"]["versions"].items())
        head = (
            f"# Right, or refused\n\nWritten by `python bench/conformance.py` with {versions}.\n\n"
        )
        full = f"{head}{markdown(rows, grouped=False)}\n\n{LEGEND}\n\n## Why\n\n{notes(rows)}\n"
        path.with_suffix(".md").write_text(full)
    return int(any(r["gradstats"].verdict == "wrong" for r in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
