"""How the cost of an operation grows with the batch B and with the positions T of a sample.

    python bench/growth.py [--ops linear conv layer_norm embedding] [--rounds 15] [--json FILE]

B and T are doubled over a range, one at a time, and all points of a curve take turns.
Shown is the time per sample and position over the median of the curve: 1 everywhere where cost is
proportional, more at the small end where a call costs something by itself, as for writing a weight
gradient. Beside it, the line a + b·n through the times (relative least squares): how far the
farthest point lies from it, and a as a share of the largest time. A peer in each row is torch's own
gradient of the same shape, without statistics.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch

from gradstats import backends
from gradstats.workbench.bench.ops import make
from gradstats.workbench.bench.timing import interleave, table
from gradstats.workbench.saved import environment

Call = Callable[[], Any]
PLAIN, KINDS = "torch", ("norms", "norms+moments")
DIM, OUT, VOCAB, CHANNELS = 256, 256, 1024, 64


def calls(op: str, b: int, t: int) -> dict[str, Call]:
    """torch's own gradient of B samples of T positions, and ours without and with moments."""
    sizes = {
        "linear": (b, t, DIM, OUT),
        "conv": (b, CHANNELS, CHANNELS, round(t**0.5), 3, 1, 1),
        "layer_norm": (b, t, DIM),
        "embedding": (b, t, VOCAB, DIM),
    }
    made = make(op, sizes[op])
    return {PLAIN: made.torch(), KINDS[0]: made.ours(), KINDS[1]: made.ours(True)}


BATCHES = (8, 16, 32, 64, 128)
OPS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    # B while T grows, T while B grows, the values of T
    "linear": (16, 64, (8, 16, 32, 64, 128, 256, 512, 1024)),
    "conv": (16, 256, (16, 64, 256, 1024, 4096)),
    "layer_norm": (16, 64, (16, 32, 64, 128, 256, 512, 1024)),
    "embedding": (16, 256, (16, 32, 64, 128, 256, 512, 1024)),
}


def line(points: list[int], seconds: list[float]) -> dict[str, float]:
    """The line through the times that is nearest in relative terms, and how far they are from it."""
    n, t = np.array(points, float), np.array(seconds)
    (start, slope), *_ = np.linalg.lstsq(np.stack([1 / t, n / t], 1), np.ones_like(t))
    farthest = np.abs(t / (start + slope * n) - 1).max()
    return {"start": float(start), "slope": float(slope), "farthest": float(farthest)}


def curves(op: str, rounds: int, turn_seconds: float) -> list[dict[str, Any]]:
    """One curve for each way to compute `op` and each of B and T."""
    batch, positions, lengths = OPS[op]
    found = []
    for axis, points in (
        ("B", [(b, positions) for b in BATCHES]),
        ("T", [(batch, t) for t in lengths]),
    ):
        steps = {(kind, b, t): call for b, t in points for kind, call in calls(op, b, t).items()}
        names = {str(key): key for key in steps}
        seconds = interleave(
            {name: steps[key] for name, key in names.items()},
            rounds=rounds, turn_seconds=turn_seconds,
        )  # fmt: skip
        for kind in (PLAIN, *KINDS):
            typical = [statistics.median(seconds[str((kind, b, t))]) for b, t in points]
            each = [s / (b * t) for s, (b, t) in zip(typical, points, strict=True)]
            middle = statistics.median(each)
            grown = [b if axis == "B" else t for b, t in points]
            found.append({
                "op": op, "kind": kind, "axis": axis, "points": grown, "line": line(grown, typical),
                "fixed": positions if axis == "B" else batch,
                "seconds": typical, "relative": [e / middle for e in each],
            })  # fmt: skip
    return found


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """A panel for each operation and axis, drawn where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(c["op"] for c in found))
    figure, axes = plt.subplots(2, len(names), figsize=(3.2 * len(names), 5.2), squeeze=False)
    for curve in found:
        panel = axes["BT".index(curve["axis"])][names.index(curve["op"])]
        panel.axhspan(0.9, 1.1, color="0.93", zorder=0)
        panel.plot(curve["points"], curve["relative"], marker=".", label=curve["kind"])
        panel.set(xscale="log", xlabel=curve["axis"], title=curve["op"], ylim=(0.5, 2))
    axes[0][0].legend(fontsize=7)
    axes[0][0].set_ylabel("time per B·T over the median")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-seconds", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=checkout.RESULTS / "growth_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    env = environment("gradstats")
    env["backends"] = {op: backends.choose(f"{op}_stats", "cpu", torch.float32) for op in args.ops}
    found = []
    for op in args.ops:
        torch.manual_seed(0)
        found += curves(op, args.rounds, args.turn_seconds)
    rows = [
        [c["op"], c["kind"], c["axis"], f"{c['line']['farthest']:.0%}",
         f"{c['line']['start'] / max(c['seconds']):.0%}",
         "  ".join(f"{p}: {r:.2f}" for p, r in zip(c["points"], c["relative"], strict=True))]
        for c in found
    ]  # fmt: skip
    head = [
        "operation",
        "",
        "grows",
        "off a line",
        "start",
        "time per sample and position, over the median",
    ]
    print(table(head, rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": env, "rounds": args.rounds, "curves": found}
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    picture(found, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
