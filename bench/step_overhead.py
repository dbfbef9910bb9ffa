"""What statistics cost: the full training step with them, over the plain step.

    python bench/step_overhead.py [--models mlp cnn gpt resnet vit] [--rounds 30] [--json FILE]

A step is forward, backward, statistics, optimizer.step and zero_grad. Every variant trains a copy
of its own and all run in turns (gradstats.workbench.bench). Before that, gradstats is compared with
the float64 truth, without which nothing is timed, and every peer with gradstats.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch

import gradstats
from gradstats.workbench.bench import steps
from gradstats.workbench.bench.models import MODELS
from gradstats.workbench.bench.peers import PACKAGES, PEERS
from gradstats.workbench.bench.steps import KINDS, NOTES, Variant
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment

LIMITS = {  # ratio to the plain step on a CPU with 2 threads: norms, norms + moments
    "mlp": (1.05, 1.40), "cnn": (1.20, 1.30), "gpt": (1.05, 1.08), "resnet": (1.25, 1.35),
    "vit": (1.08, 1.15),
}  # fmt: skip
SCHEDULED_LIMITS = {"gpt": 1.06}  # with a batch-size scheduler


def limit(model: str, variant: str) -> float | None:
    """What the ratio should not exceed, where that is set."""
    kinds = [f"gradstats {kind}" for kind in KINDS]
    if variant in kinds and model in LIMITS:
        return LIMITS[model][kinds.index(variant)]
    return SCHEDULED_LIMITS.get(model) if variant == "gradstats norms+scheduler" else None


def cells(model: str, row: Variant) -> list[str]:
    most = limit(model, row.name)
    if row.seconds is None or row.ratio is None:
        return [model, row.name, "", row.remark, "", ""]
    shown = "" if most is None else f"≤ {most:.2f}"
    ms = f"{row.seconds.median * 1e3:.2f}"
    return [model, row.name, ms, str(row.ratio), shown, row.remark]


def keep_heap() -> None:
    """Have glibc keep what is freed: else the variant that it takes pages from and back pays for all."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
        mallopt(mmap_threshold, 2**25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "gpt"], choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--turn-seconds", type=float, default=0.1, help="of a variant, in each round"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tiny", action="store_true", help="small models: a smoke run, no figures")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_heap()
    torch.set_num_threads(args.threads)
    env = environment("gradstats", *PACKAGES)
    env["versions"]["gradstats"] = gradstats.__version__
    env["backends"] = {op: gradstats.backends.choose(op, "cpu", torch.float32)
                       for op in ("linear_stats", "layer_norm_stats", "group_norm_stats",
                                  "embedding_stats", "conv_stats", "multi_sq_norm")}  # fmt: skip
    head = ["model", "variant", "ms", "ratio to plain (quartiles)", "limit", "remark"]
    results: dict[str, Any] = {}
    lines = []
    for model in args.models:
        rows = steps.measure(
            model,
            args.rounds,
            args.peers,
            tiny=args.tiny,
            turn_seconds=args.turn_seconds,
            say=lambda text: print(text, file=sys.stderr),
        )
        results[model] = {
            row.name: {**row.to_dict(), "limit": limit(model, row.name)} for row in rows
        }
        lines += [cells(model, row) for row in rows]
    print(table(head, lines))
    remarks = {word for row in lines for word in NOTES if word in row[-1]}
    for word in sorted(remarks):
        print(f"{word}: {NOTES[word]}")
    if args.json is not None:
        report = {"environment": env, "rounds": args.rounds, "tiny": args.tiny, "models": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
