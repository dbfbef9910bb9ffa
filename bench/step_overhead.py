"""What statistics cost: the full training step with them, over the plain step.

    python bench/step_overhead.py [--models mlp cnn gpt resnet vit] [--rounds 30] [--json FILE]

A step is forward, backward, statistics, optimizer.step and zero_grad. Every variant trains a copy
of its own and all run in turns (see timing.py). Before that, gradstats is compared with the float64
truth, without which nothing is timed, and every peer with gradstats.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from check import Monitored, Scheduled, check_gradstats, check_peer
from models import WORKLOADS, Problem
from peers import PACKAGES, PEERS, Refused, Step, first_line
from timing import Spread, environment, interleave, ratios, table

import gradstats

KINDS = ("norms", "norms+moments")
LIMITS = {  # ratio to the plain step on a CPU with 2 threads: norms, norms + moments
    "mlp": (1.05, 1.40), "cnn": (1.20, 1.30), "gpt": (1.05, 1.08), "resnet": (1.25, 1.35),
    "vit": (1.08, 1.15),
}  # fmt: skip
SCHEDULED_LIMITS = {"gpt": 1.06}  # with a batch-size scheduler
ADAPTED = {"gpt": {"batched_positions": True}}  # the same function, in a form that more tools take
NOTES = {
    "partial": "leaves out layers it does not know: its time is of less work",
    "adapted": "refuses the model as it is; runs a form with position ids per sample",
    "wrong": "its per-sample norms differ from gradstats'",
}


@dataclasses.dataclass
class Variant:
    """One row: a way to statistics on one model."""

    name: str
    step: Step | None = None
    status: str = "ok"
    note: str = ""
    error: float | None = None
    limit: float | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None

    def cells(self, model: str) -> list[str]:
        if self.seconds is None or self.ratio is None:
            return [model, self.name, "", f"{self.status}: {self.note}", "", ""]
        status = self.status if not self.note else f"{self.status}, {self.note}"
        limit = "" if self.limit is None else f"≤ {self.limit:.2f}"
        ms = f"{self.seconds.median * 1e3:.2f}"
        return [model, self.name, ms, str(self.ratio), limit, "" if status == "ok" else status]

    def as_json(self) -> dict[str, Any]:
        fields = ("status", "note", "error", "limit")
        row: dict[str, Any] = {name: getattr(self, name) for name in fields}
        for name in ("seconds", "ratio"):
            spread = getattr(self, name)
            row[name] = None if spread is None else dataclasses.asdict(spread)
        return row


def peer(name: str, kind: str, model: str, problem: Problem, record: Any, tiny: bool) -> Variant:
    """The peer's variant, checked; on the adapted form of the model where the plain one fails."""
    found = Variant(f"{name} {kind}")
    forms: list[tuple[str, Problem]] = [("", problem)]
    if model in ADAPTED:
        forms.append(("adapted", WORKLOADS[model].make(tiny=tiny, **ADAPTED[model])))
    for note, form in forms:
        try:
            step = PEERS[name](form, moments=kind == KINDS[1])
            status, error = check_peer(step, record)
        except Exception as refusal:
            if found.step is None:
                reason = str(refusal) if isinstance(refusal, Refused) else first_line(refusal)
                found.status, found.note = "refused", found.note or reason
            continue
        if found.step is None or status != "wrong":
            found.step, found.status, found.note, found.error = step, status, note, error
        if status != "wrong":
            break
    return found


def variants(model: str, problem: Problem, peers: list[str], tiny: bool) -> list[Variant]:
    errors, record = check_gradstats(problem)
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{model}: gradstats against float64, relative: {shown}", file=sys.stderr)
    rows = [Variant("plain", Step(problem))]
    for i, kind in enumerate(KINDS):
        limit = LIMITS[model][i] if model in LIMITS else None
        step = Monitored(problem, moments=bool(i))
        rows.append(Variant(f"gradstats {kind}", step, error=errors["norms"], limit=limit))
    limit = SCHEDULED_LIMITS.get(model)
    step = Scheduled(problem)
    rows.append(Variant("gradstats norms+scheduler", step, error=errors["norms"], limit=limit))
    rows += [peer(name, kind, model, problem, record, tiny) for kind in KINDS for name in peers]
    return rows


def measure(
    model: str, rounds: int, peers: list[str], tiny: bool = False, turn_seconds: float = 0.1
) -> list[Variant]:
    rows = variants(model, WORKLOADS[model].make(tiny=tiny), peers, tiny)
    steps = {row.name: row.step for row in rows if row.step is not None}
    seconds = interleave(steps, rounds=rounds, turn_seconds=turn_seconds)
    ratio = ratios(seconds, "plain")
    for row in rows:
        if row.name in seconds:
            row.seconds, row.ratio = Spread.of(seconds[row.name]), ratio[row.name]
        row.step = None
    gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["mlp", "cnn", "gpt"], choices=list(WORKLOADS)
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--turn-seconds", type=float, default=0.1, help="of a variant, in each round"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tiny", action="store_true", help="small models: a smoke run, no figures")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for message in (".*full backward hook.*", ".*performance drop.*"):
        warnings.filterwarnings("ignore", message=f"(?i){message}")
    env = environment("gradstats", *PACKAGES)
    env["versions"]["gradstats"] = gradstats.__version__
    env["backends"] = {op: gradstats.backends.choose(op, "cpu", torch.float32)
                       for op in ("linear_stats", "layer_norm_stats", "group_norm_stats",
                                  "embedding_stats", "conv_stats", "multi_sq_norm")}  # fmt: skip
    head = ["model", "variant", "ms", "ratio to plain (quartiles)", "limit", "remark"]
    results: dict[str, Any] = {}
    cells = []
    for model in args.models:
        rows = measure(model, args.rounds, args.peers, args.tiny, args.turn_seconds)
        results[model] = {row.name: row.as_json() for row in rows}
        cells += [row.cells(model) for row in rows]
    print(table(head, cells))
    remarks = {word for row in cells for word in NOTES if word in row[-1]}
    for word in sorted(remarks):
        print(f"{word}: {NOTES[word]}")
    if args.json is not None:
        report = {"environment": env, "rounds": args.rounds, "tiny": args.tiny, "models": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
