"""Starts the process that tries sizes, and makes sense of how it ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench.vram.limits import ran_out
from gradstats.workbench.vram.line import OVER, spilled
from gradstats.workbench.vram.result import Point

__all__ = ["Told", "Trial", "try_sizes"]

# Of a process: the kernel's out-of-memory killer, and what code does that gets no memory and does not look.
KILLED = (signal.SIGKILL,)
CRASHED = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


@dataclass(frozen=True)
class Trial:
    """What every process of a search is told. `budget`: bytes, None for what there is."""

    target: str
    seed: int
    budget: int | None
    share: float
    plain: bool
    steps: int
    most_seconds: float


@dataclass
class Told:
    """What the processes told: the points of all, and the rest as of the last."""

    points: list[Point] = field(default_factory=list)
    device: str = ""
    budget: int = 0
    model_bytes: int | None = None
    retries: int = 0


def try_sizes(
    trial: Trial,
    sizes: Sequence[int],
    told: Told,
    enough: float = math.inf,
    report: Callable[[int], object] = lambda size: None,
) -> None:
    """Take steps at each size in turn, in one new process held to ``share·budget``.

    It ends with the size that does not fit, or that has used up `enough` of what the first size left of
    the limit, or whose step takes longer than `most_seconds`. What it finds is added to `told` as it
    comes; the last point is that of the size it ended with.
    `report` is called with each size before it is tried.

    Raises InvalidArgumentError for a target that cannot be used, GradStatsError where the user's code
    fails by something else than memory, or for want of memory before a step could be taken.
    """
    fresh = len(sizes) == 1
    todo = {**asdict(trial), "sizes": list(sizes), "enough": enough}
    begun = 0
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradstats.workbench.vram.child", str(writing)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            pass_fds=(writing,),
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(todo))
            process.stdin.close()
            with os.fdopen(reading, encoding="utf-8") as lines:
                for line in lines:
                    event = json.loads(line)
                    if event["event"] == "end":
                        break
                    if event["event"] == "begin":
                        begun = event["size"]
                        report(begun)
                    elif event["event"] == "error":
                        _failed(trial, event, told, begun, fresh)
                    else:
                        _note(told, event, fresh)
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        if code != 0:
            _died(code, said.read(), told, begun, fresh)


def _note(told: Told, event: dict[str, Any], fresh: bool) -> None:
    if event["event"] == "loaded":
        told.device, told.budget = event["device"], event["budget"]
        return
    told.model_bytes = event["model"]
    told.retries += event.get("retries", 0)
    ok, why = event["ok"], "" if event["ok"] else OVER
    size, peak, seconds = event["size"], event["peak"], event["seconds"]
    point = Point(size, peak, seconds, ok, why, fresh, event.get("allocated"))
    times = spilled([*told.points, point]) if told.device != "cpu" else 0
    if times:
        why = f"{times:.1f} times the seconds per sample of smaller sizes: the driver lent host memory"
        point = replace(point, ok=False, why=why)
    told.points.append(point)


def _failed(trial: Trial, event: dict[str, Any], told: Told, begun: int, fresh: bool) -> None:
    if event["memory"] and begun:
        told.points.append(Point(begun, None, None, False, event["text"], fresh))
        return
    if event["kind"] == "InvalidArgumentError":
        raise InvalidArgumentError(event["text"])
    if event["memory"]:
        text = event["text"].removeprefix("MemoryError: ")
        raise GradStatsError(f"{trial.target} does not fit before a step is taken: {text}")
    hint = "; --plain goes without the monitor" if event["ours"] and not trial.plain else ""
    at = f" at a micro-batch of {begun}" if begun else ""
    raise GradStatsError(f"{trial.target} failed{at}: {event['text']}{hint}")


def _died(code: int, said: str, told: Told, begun: int, fresh: bool) -> None:
    """A process that ended without saying why: of its limit, or of something else."""
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    smaller = any(p.ok for p in told.points)
    by_limit = -code in KILLED or ran_out(said) or (-code in CRASHED and smaller)
    if begun and by_limit:
        told.points.append(Point(begun, None, None, False, f"the process ended by {name}", fresh))
        return
    where = f"at a micro-batch of {begun}" if begun else "before a step was taken"
    raise GradStatsError(
        f"the process that tries the steps ended by {name} {where}"
        + (f" ({last.strip()})" if last else "")
        + "; if that is for lack of memory, give more"
    )
