"""What statistics cost in memory: peak of the training step above the plain step's.

    python bench/peak_memory.py [--models mlp cnn gpt] [--json FILE]

Every variant runs in a process of its own. Two measures, because each sees what the other cannot:
- allocations: the profiler's record of every allocation and release of the CPU allocator, from
  before `attach` on, so that state kept between steps counts too. Exact, buffers inside operators
  included; blind to what worker threads and libraries allocate by other means.
- resident: the process's high-water mark (VmHWM, reset before the step). Sees everything, but in
  pages, and an allocator that keeps freed memory blurs it.
`largest` is the largest single allocation of the step: were per-sample gradients of a weight ever
held, it would be at least B times that weight.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch

import gradstats
from gradstats.workbench.bench.models import MODELS, Problem
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment

VARIANTS = ("plain", "norms", "moments")
FALLBACK_BYTES = (2**28, 2**24, 2**22)  # of the fallback's example
MARK = "measured step"
MB = 1e6


def allocations(profiler: torch.profiler.profile) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation (positive) and release (negative), in order."""
    results = profiler.profiler.kineto_results
    memory = [e for e in results.events() if e.name() == "[memory]"]
    yield from sorted(((e.start_ns(), e.nbytes()) for e in memory), key=lambda event: event[0])


def resident(reset: bool = False) -> int | None:
    """High-water mark of resident bytes, or None where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train(problem: Problem, variant: str, fallback_bytes: int) -> Any:
    """The step of a variant, with nothing kept between calls but what the monitor keeps."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-4)
    attach, monitor = gradstats.attach, None  # loads the code for the plain step too
    if variant != "plain":
        monitor = attach(problem.model, moments=variant == "moments", fallback_bytes=fallback_bytes)

    def step() -> None:
        problem.loss(problem.model).backward()
        if monitor is not None:
            monitor.step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(model: str, variant: str, tiny: bool, fallback_bytes: int) -> dict[str, Any]:
    """Peak and largest allocation of the third step, in bytes above the model and its data."""
    problem = MODELS[model].make(tiny=tiny)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step = train(problem, variant, fallback_bytes)
        step()
        step()
        with torch.profiler.record_function(MARK):
            step()
    events = profiler.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == MARK)
    live = peak = largest = 0
    for time, size in allocations(profiler):
        live += size
        if time >= begin:
            peak, largest = max(peak, live), max(largest, size)
    resident(reset=True)
    step()
    params = [p.numel() * p.element_size() for p in problem.model.parameters()]
    return {
        "peak": peak,
        "largest": largest,
        "resident": resident(),
        "batch": len(problem.inputs),
        "parameters": sum(params),
        "largest_parameter": max(params),
        "num_parameters": len(params),
    }


def in_a_process(model: str, variant: str, tiny: bool, fallback_bytes: int, threads: int) -> Any:
    command = [sys.executable, __file__, "--one", model, variant, str(fallback_bytes)]
    command += ["--threads", str(threads)] + (["--tiny"] if tiny else [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{model} {variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(model: str, name: str, found: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    extra = found["peak"] - plain["peak"]
    rss = (
        "" if found["resident"] is None else f"{(found['resident'] - plain['resident']) / MB:+.1f}"
    )
    return [
        model, name, f"{found['peak'] / MB:.2f}", f"{extra / MB:+.2f}",
        f"{extra / found['parameters']:+.2f}", rss, f"{found['largest'] / MB:.2f}",
        f"{found['largest_parameter'] * found['batch'] / MB:.1f}",
        f"{found['batch'] * found['num_parameters'] * 4 / MB:.3f}",
        f"{found['batch'] * found['parameters'] / MB:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "gpt"], choices=list(MODELS))
    parser.add_argument(
        "--no-fallback", action="store_true", help="leave the shared-layer example out"
    )
    parser.add_argument("--tiny", action="store_true", help="small models: a smoke run, no figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "VARIANT", "BYTES"),
                        help="one variant in this process, as JSON")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(args.one[0], args.one[1], args.tiny, int(args.one[2]))))
        return
    runs = [(m, v, v, FALLBACK_BYTES[0]) for m in args.models for v in VARIANTS]
    if not args.no_fallback:
        runs += [("shared", "plain", "plain", FALLBACK_BYTES[0])]
        runs += [("shared", f"norms, fallback_bytes={size // 2**20} MiB", "norms", size)
                 for size in FALLBACK_BYTES]  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for model, name, variant, size in runs:
        result = in_a_process(model, variant, args.tiny, size, args.threads)
        found.setdefault(model, {})[name] = result
        rows.append(row(model, name, result, found[model]["plain"]))
    print("MB; `extra` is above the plain step; P: bytes of all parameters; B: batch")
    print(table(["model", "variant", "peak", "extra", "extra/P", "extra resident", "largest",
                 "B × largest weight", "B × parameters × 4", "B × P"], rows))  # fmt: skip
    if args.json is not None:
        report = {"environment": environment("gradstats"), "tiny": args.tiny, "models": found}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
