"""Times as pytest-benchmark keeps them, so that its tools read ours and ours read its."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.workbench import saved

__all__ = ["Timed", "read", "write"]


@dataclass(frozen=True)
class Timed:
    """One benchmark: seconds per call in each round (none where it could not run), and what else is known."""

    group: str
    name: str
    seconds: tuple[float, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "fullname": f"gradstats bench::{self.name}",
            "params": None,
            "param": None,
            "extra_info": dict(self.extra),
            "options": {"warmup": True, "timer": "perf_counter"},
            "stats": stats(self.seconds),
        }


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """The statistics that pytest-benchmark keeps of a benchmark, as it defines them."""
    ordered = sorted(seconds)
    mean, median = statistics.fmean(ordered), statistics.median(ordered)
    spread = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
    q1 = q3 = median
    if len(ordered) > 1:
        q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    reach = 1.5 * (q3 - q1)
    inside = [s for s in ordered if q1 - reach <= s <= q3 + reach]
    far = sum(abs(s - mean) > spread for s in ordered)
    out = len(ordered) - len(inside)
    return {
        "min": ordered[0], "max": ordered[-1], "mean": mean, "stddev": spread,
        "rounds": len(ordered), "median": median, "iqr": q3 - q1, "q1": q1, "q3": q3,
        "iqr_outliers": out, "stddev_outliers": far, "outliers": f"{far};{out}",
        "ld15iqr": inside[0], "hd15iqr": inside[-1], "ops": 1 / mean, "total": sum(ordered),
        "data": list(seconds), "iterations": 1,
    }  # fmt: skip


def write(path: Path, timed: Sequence[Timed], content: Mapping[str, Any]) -> None:
    """Write a file that `pytest-benchmark compare` reads; `content` is beside it, under its own names.

    Raises InvalidArgumentError where it cannot be written.
    """
    found = content["environment"]
    machine = {
        "node": platform.node(),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "cpu": {"brand_raw": found["cpu"], "count": found["cores"]},
    }
    commit = {"id": None, "time": None, "dirty": None, "project": "gradstats", "branch": None}
    whole = {
        "machine_info": machine,
        "commit_info": commit,
        "datetime": found["date"],
        "benchmarks": [each.to_dict() for each in timed if each.seconds],
        **content,
    }
    saved.write(path, "bench", whole)


def read(path: Path) -> list[dict[str, Any]]:
    """The benchmarks of a file of pytest-benchmark's, made by it or by `write`.

    Raises InvalidArgumentError where it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidArgumentError(f"{path} cannot be read ({why})") from error
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(
            f"{path} is not JSON from line {error.lineno} on; was it cut short?"
        ) from error
    marks = found.get("benchmarks") if isinstance(found, dict) else None
    needed = {"median", "q1", "q3", "rounds"}
    if not isinstance(marks, list) or not all(
        isinstance(mark, dict) and "fullname" in mark and needed <= set(mark.get("stats") or ())
        for mark in marks
    ):
        raise InvalidArgumentError(
            f"{path} holds no benchmarks of pytest-benchmark; `gradstats bench --out FILE` and `pytest "
            "--benchmark-json FILE` write them"
        )
    return marks
