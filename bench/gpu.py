"""Everything that a CUDA machine has to show, in one script: build, check, time, report.

    python bench/gpu.py [--only linear norm conv ...] [--no-build] [--json FILE]
    python bench/gpu.py --dry-run      the checks alone, on small CPU tensors with the reference

Builds the extension in place where there is nvcc (nothing is installed), compares every operation
with float64, then times in turns with CUDA events and rotating inputs. What fails its check is not
timed. Without a CUDA device it says so and makes a dry run: no figure is ever written for one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout
import torch
from gpu_gather import conv_cases, embedding_cases, tied_cases
from gpu_ops import Case, chosen, linear_cases, multi_cases, norm_cases
from gpu_steps import LIMITS, step_cases

from gradstats import backends
from gradstats.workbench.bench.models import MODELS
from gradstats.workbench.bench.timing import Spread, interleave, ratios, table
from gradstats.workbench.saved import environment

OPERATIONS = {
    "linear": linear_cases,
    "norm": norm_cases,
    "embedding": embedding_cases,
    "conv": conv_cases,
    "tied": tied_cases,
}
GROUPS = (*OPERATIONS, "multi", "steps")
HEAD = ("case", "variant", "µs", "ratio (quartiles)", "limit", "TFLOP/s", "GB/s", "error", "remark")


def build() -> str:
    """Build the CUDA part of the extension in place, where that is possible; says what was done."""
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return "nvcc was not found: the CUDA C++ part is not built, Triton only"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "GRADSTATS_BUILD": "cuda"}
    done = subprocess.run(command, cwd=checkout.ROOT, env=env, check=False)
    if done.returncode:
        sys.exit("the build failed (see above); --no-build measures what is there")
    return "built with GRADSTATS_BUILD=cuda"


def cases(only: list[str], models: list[str], device: str, small: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, of in OPERATIONS.items():
        if name in only:
            yield from of(device, dtype, small)
    if "multi" in only:
        model = MODELS["gpt2-124m"].make(tiny=small).model
        yield from multi_cases(device, [tuple(p.shape) for p in model.parameters()])
    if "steps" in only:
        yield from step_cases(models, device, small)


def rows(case: Case, error: float, seconds: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    for name, ratio in ratios(seconds, case.base[0]).items():
        time = Spread.of(seconds[name])
        limit = case.limits.get(name)
        yield {
            "case": case.name,
            "variant": name,
            "seconds": time.median,
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.low, ratio.high],
            "limit": limit,
            "within": None if limit is None else ratio.median <= limit,
            "tflops": case.flops / time.median / 1e12 if case.flops else None,
            "gb_per_s": case.bytes_moved / time.median / 1e9 if case.bytes_moved else None,
            "error": error,
            "remark": case.remarks.get(name, ""),
        }


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["ratio_quartiles"]
    limit = row["limit"]
    numbers = [f"{row[k]:.0f}" if row[k] is not None else "" for k in ("tflops", "gb_per_s")]
    return [
        row["case"], row["variant"], f"{row['seconds'] * 1e6:.1f}",
        f"{row['ratio']:.3f} ({low:.3f}–{high:.3f})",
        "" if limit is None else f"≤ {limit:.2f}{'' if row['within'] else ' missed'}",
        *numbers, f"{row['error']:.0e}", row["remark"],
    ]  # fmt: skip


def run(
    args: argparse.Namespace, device: str, small: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Check each case, then time it; a dry run calls what would be timed once, without a clock."""
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for case in cases(args.only, args.models, device, small):
        error = case.check()
        good = error <= case.tolerance
        verdict = "ok" if good else "WRONG, not timed"
        print(
            f"{case.name}: error {error:.1e}, at most {case.tolerance:.0e}: {verdict}", flush=True
        )
        if not good:
            wrong.append(case.name)
            continue
        variants = dict([case.base, *case.variants.items()])
        if args.dry_run:
            for call in variants.values():
                call()
            continue
        seconds = interleave(
            variants,
            rounds=args.rounds,
            warmup=case.warmup,
            turn_seconds=args.turn_seconds,
            device=device,
        )
        found += rows(case, error, seconds)
        del case, variants
        torch.cuda.empty_cache()
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--models", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--dry-run", action="store_true", help="checks alone, small CPU tensors")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--turn-seconds", type=float, default=0.02)
    parser.add_argument("--json", type=Path, default=checkout.RESULTS / "gpu.json")
    args = parser.parse_args()
    for message in (".*full backward hook.*", ".*performance drop.*"):
        warnings.filterwarnings("ignore", message=f"(?i){message}")
    if not args.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing is timed. A dry run of the checks follows.")
        args.dry_run = True
    if args.dry_run:
        with backends.use("reference"):
            wrong = run(args, "cpu", small=True)[1]
        print("dry run on the CPU: " + (f"wrong: {wrong}" if wrong else "every check passed"))
        sys.exit(bool(wrong))
    how = "not built" if args.no_build else build()
    env = environment("triton")
    env["build"], env["backends"] = how, chosen("cuda", torch.bfloat16)
    env["cuda"] = torch.version.cuda
    env["l2_bytes"] = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"{env['gpu']}, torch {torch.__version__}, {how}; backends {env['backends']}")
    found, wrong = run(args, "cuda", small=False)
    print(table(HEAD, [cells(row) for row in found]))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": env, "rounds": args.rounds, "wrong": wrong, "rows": found}
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
