"""How the cost of an operation grows with the batch B and with the positions T of a sample.

    python bench/growth.py [--ops linear conv layer_norm embedding] [--cached] [--json FILE]

B and T are doubled over a range, one at a time, and all points of a curve take turns.
A time is the lower quartile of rounds, for what else runs on the machine only adds. Shown is the
time per sample and position over the median of the curve: 1 everywhere where cost is proportional,
more at the small end where a call costs something by itself, as for writing a weight gradient.
Beside it, the line a + b·n through the times (relative least squares): a as a share of the largest
time, how far the farthest point lies from the line, marked where that is beyond 10%, and how far
that point's rounds scatter (half the distance between their quartiles). A peer in each row is
torch's own gradient of the same shape, without statistics.

Calls take turns over copies of the inputs, with 64 MB read between two uses of the same: else small
inputs are found in the L2 cache and large ones are not. In training they never are, for the rest of
the network comes in between. `--cached` has every call take the same inputs, which shows that step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch

from gradstats import backends
from gradstats.workbench.bench.ops import make
from gradstats.workbench.bench.timing import Spread, interleave, table
from gradstats.workbench.saved import environment

Call = Callable[[], Any]
PLAIN, KINDS = "torch", ("norms", "norms+moments")
DIM, OUT, VOCAB, CHANNELS = 256, 256, 1024, 64

BETWEEN = 64 << 20  # bytes of inputs read before the same come again
WITHIN = 0.1  # of a line, where cost grows linearly


def calls(op: str, b: int, t: int, cached: bool) -> dict[str, Call]:
    """torch's own gradient of B samples of T positions, and ours without and with moments."""
    sizes = {
        "linear": (b, t, DIM, OUT),
        "conv": (b, CHANNELS, CHANNELS, round(t**0.5), 3, 1, 1),
        "layer_norm": (b, t, DIM),
        "embedding": (b, t, VOCAB, DIM),
    }
    made = make(op, sizes[op])
    read = sum(tensor.nbytes for tensor in made.tensors)
    copies = [made] + [
        replace(made, tensors=tuple(tensor.clone() for tensor in made.tensors))
        for _ in range(0 if cached else BETWEEN // read)
    ]
    return {
        PLAIN: in_turns([copy.torch() for copy in copies]),
        KINDS[0]: in_turns([copy.ours() for copy in copies]),
        KINDS[1]: in_turns([copy.ours(True) for copy in copies]),
    }


def in_turns(each: list[Call]) -> Call:
    turns = itertools.cycle(each)
    return lambda: next(turns)()


BATCHES = (8, 16, 32, 64, 128)
OPS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    # B while T grows, T while B grows, the values of T
    "linear": (16, 64, (8, 16, 32, 64, 128, 256, 512, 1024)),
    "conv": (16, 256, (16, 64, 256, 1024, 4096)),
    "layer_norm": (16, 64, (16, 32, 64, 128, 256, 512, 1024)),
    "embedding": (16, 256, (16, 32, 64, 128, 256, 512, 1024)),
}


def line(points: list[int], seconds: list[float]) -> dict[str, float]:
    """The line through the times that is nearest in relative terms, and how far off the farthest is."""
    n, t = np.array(points, float), np.array(seconds)
    (start, slope), *_ = np.linalg.lstsq(np.stack([1 / t, n / t], 1), np.ones_like(t))
    off = np.abs(t / (start + slope * n) - 1)
    return {
        "start": float(start), "slope": float(slope),
        "farthest": float(off.max()), "farthest_point": points[int(off.argmax())],
    }  # fmt: skip


def curves(op: str, rounds: int, turn_seconds: float, cached: bool) -> list[dict[str, Any]]:
    """One curve for each way to compute `op` and each of B and T."""
    batch, positions, lengths = OPS[op]
    found = []
    for axis, points in (
        ("B", [(b, positions) for b in BATCHES]),
        ("T", [(batch, t) for t in lengths]),
    ):
        steps = {
            (kind, b, t): call for b, t in points for kind, call in calls(op, b, t, cached).items()
        }
        names = {str(key): key for key in steps}
        seconds = interleave(
            {name: steps[key] for name, key in names.items()},
            rounds=rounds, turn_seconds=turn_seconds,
        )  # fmt: skip
        for kind in (PLAIN, *KINDS):
            spreads = [Spread.of(seconds[str((kind, b, t))]) for b, t in points]
            typical = [s.low for s in spreads]
            each = [s / (b * t) for s, (b, t) in zip(typical, points, strict=True)]
            middle = statistics.median(each)
            grown = [b if axis == "B" else t for b, t in points]
            found.append({
                "op": op, "kind": kind, "axis": axis, "points": grown, "line": line(grown, typical),
                "fixed": positions if axis == "B" else batch,
                "seconds": typical, "relative": [e / middle for e in each],
                "unsure": [(s.high - s.low) / 2 / s.median for s in spreads],
            })  # fmt: skip
    return found


def row(curve: dict[str, Any]) -> list[str]:
    """A curve in the table."""
    fit, points = curve["line"], curve["points"]
    at = fit["farthest_point"]
    return [
        curve["op"], curve["kind"], curve["axis"],
        f"{fit['start'] / max(curve['seconds']):.0%}",
        f"{fit['farthest']:.0%} at {at}", f"± {curve['unsure'][points.index(at)]:.0%}",
        f"beyond {WITHIN:.0%}" if fit["farthest"] > WITHIN else "",
        "  ".join(f"{p}: {r:.2f}" for p, r in zip(points, curve["relative"], strict=True)),
    ]  # fmt: skip


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
    parser.add_argument("--cached", action="store_true", help="every call takes the same inputs")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--turn-seconds", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=checkout.RESULTS / "growth_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    env = environment("gradstats")
    env["backends"] = {op: backends.choose(f"{op}_stats", "cpu", torch.float32) for op in args.ops}
    found = []
    for op in args.ops:
        torch.manual_seed(0)
        found += curves(op, args.rounds, args.turn_seconds, args.cached)
    head = ["operation", "", "grows", "start", "off a line", "", "", "time per B·T over the median"]
    print(table(head, [row(curve) for curve in found]))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": env, "rounds": args.rounds, "cached": args.cached, "curves": found}
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    picture(found, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
