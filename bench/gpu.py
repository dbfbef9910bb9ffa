"""Everything that a CUDA machine has to show, in one script: build, check, time, report.

    python bench/gpu.py [--only linear norm conv ...] [--minutes 8] [--no-build] [--json FILE]
    python bench/gpu.py --dry-run      the checks alone, on small CPU tensors with the reference

Builds the extension in place where there is nvcc (nothing is installed), compares every operation
with float64, then times in turns with CUDA events and rotating inputs. What fails its check is not
timed, and no case that fails, hangs or kills the process that measures ends the run: the report is
written after each. Without a CUDA device it says so and makes a dry run: no figure is ever written
for one.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout
import torch
from gpu_ops import chosen
from gpu_steps import LIMITS
from gpu_worker import GROUPS, work

from gradstats import backends
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment, write_text

PATIENCE = 240.0  # seconds without a word: more than it takes to compile a whole model
START = "the start of the process"
METHOD = "spawn"  # of processes: a CUDA context does not outlive a fork
Work = Callable[..., None]  # gpu_worker.work, or what a test puts in its place
HEAD = ("case", "variant", "µs", "ratio (quartiles)", "limit", "TFLOP/s", "GB/s", "error", "remark")


def build() -> str:
    """Build the CUDA part of the extension in place, where that is possible; says what was done."""
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return "nvcc was not found: the CUDA C++ part is not built, Triton only"
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}" + "a" * (major == 9)  # this device alone: what compiles soonest
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "GRADSTATS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arch}
    done = subprocess.run(command, cwd=checkout.ROOT, env=env, check=False)
    if done.returncode:
        return "the build failed (see above): Triton only"
    return f"built with GRADSTATS_BUILD=cuda for {arch}"


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


def supervise(
    args: argparse.Namespace, report: dict[str, Any], body: Work, deadline: float = math.inf,
    patience: float = PATIENCE,
) -> None:  # fmt: skip
    """Fill the report, case by case, from processes that go on where the one before them ended."""
    done: set[str] = set()
    while (ended := follow(args, report, body, done, deadline, patience)) is not None:
        name, why = ended
        print(f"{name}: {why}", flush=True)
        if name not in done:  # else it has told what became of this one, and begun no other
            take("failed", name, why, done, report, args.json)
        if name == START:  # the next one would fare no better
            return


def follow(
    args: argparse.Namespace, report: dict[str, Any], body: Work, done: set[str],
    deadline: float, patience: float,
) -> tuple[str, str] | None:  # fmt: skip
    """Start a process and take what it tells; None, or (the case at which it ended, why)."""
    context = multiprocessing.get_context(METHOD)
    receiver, sender = context.Pipe(duplex=False)  # what is sent has arrived, whatever comes then
    worker = context.Process(target=tell_all, args=(body, args, frozenset(done), sender))
    worker.start()
    sender.close()
    name = START
    try:
        while receiver.poll(patience):
            what, said, result = receiver.recv()
            name = said or name
            if what == "begun" and time.monotonic() > deadline:
                print(f"{name} and all that follow: left out, --minutes are over", flush=True)
                report["left_out_from"] = name
                save(args.json, report)
                return None
            if what == "end":
                return None
            if what not in ("begun", "alive"):
                take(what, name, result, done, report, args.json)
        return name, f"no word within {patience:.0f} s"
    except EOFError:
        worker.join()
        return name, f"the process died, exit code {worker.exitcode}"
    finally:
        worker.kill()
        worker.join()


def tell_all(body: Work, args: argparse.Namespace, done: frozenset[str], sender: Any) -> None:
    """What a worker's process runs."""
    body(args, "cuda", done, lambda *told: sender.send(told))


def take(
    what: str, name: str, result: Any, done: set[str], report: dict[str, Any], path: Path
) -> None:
    done.add(name)
    if what == "failed":
        report["failed"][name] = result
    else:
        report["rows"] += result
        print(table(HEAD, [cells(row) for row in result]), flush=True)
    save(path, report)


def save(path: Path, report: dict[str, Any]) -> None:
    write_text(path, json.dumps(report, indent=1) + "\n")


def dry_run(args: argparse.Namespace) -> list[str]:
    """The cases that fail on the CPU."""
    failed: list[str] = []

    def tell(what: str, name: str, result: Any) -> None:
        if what == "failed":
            failed.append(name)

    with backends.use("reference"):
        work(args, "cpu", frozenset(), tell)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--models", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--dry-run", action="store_true", help="checks alone, small CPU tensors")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--minutes", type=float, help="begin no case later than this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--turn-seconds", type=float, default=0.02)
    parser.add_argument("--json", type=Path, default=checkout.RESULTS / "gpu.json")
    args = parser.parse_args()
    began = time.monotonic()
    if not args.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing is timed. A dry run of the checks follows.")
        args.dry_run = True
    if args.dry_run:
        failed = dry_run(args)
        print("dry run on the CPU: " + (f"wrong: {failed}" if failed else "every check passed"))
        sys.exit(bool(failed))
    how = "not built" if args.no_build else build()
    env = environment("triton")
    env["build"], env["backends"] = how, chosen("cuda", torch.bfloat16)
    env["cuda"] = torch.version.cuda
    env["l2_bytes"] = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"{env['gpu']}, torch {torch.__version__}, {how}; backends {env['backends']}", flush=True)
    report = {"environment": env, "rounds": args.rounds, "failed": {}, "rows": []}
    deadline = began + 60 * args.minutes if args.minutes else math.inf
    supervise(args, report, work, deadline)
    print(table(HEAD, [cells(row) for row in report["rows"]]))
    for name, why in report["failed"].items():
        print(f"{name}: {why}")
    sys.exit(bool(report["failed"]))


if __name__ == "__main__":
    main()
