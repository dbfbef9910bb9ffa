"""What this machine offers a training: processors, memory, GPUs. Standard library, and torch when asked."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Gpu", "Machine", "available_bytes", "cpu_quota", "machine", "memory_limit"]

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
OWN_GROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: bytes of its memory, and those free now."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a process may use here; None where that is not known.

    `cores` of the machine, of which the process may run on `usable_cores`, for `cpu_quota` seconds of
    processor time a second (a container's limit); torch uses `threads`. `memory_bytes` of the machine,
    `available_bytes` of it to be had now, at most `memory_limit` for this container.
    """

    cores: int | None
    usable_cores: int | None
    cpu_quota: float | None
    threads: int
    memory_bytes: int | None
    available_bytes: int | None
    memory_limit: int | None
    gpus: tuple[Gpu, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    def limits(self) -> list[str]:
        """What a training here runs into first, in words."""
        found = []
        most = min(c for c in (self.usable_cores, self.cores, math.inf) if c is not None)
        if self.cpu_quota is not None and self.cpu_quota < most:
            most = self.cpu_quota
            found.append(f"a quota of {self.cpu_quota:.3g} of {self.cores} cores' time")
        if self.threads < most < math.inf:
            asked = os.environ.get("OMP_NUM_THREADS")
            why = f"OMP_NUM_THREADS={asked}" if asked else "torch.set_num_threads sets it"
            found.append(f"torch computes with {self.threads} of {most:g} cores ({why})")
        elif self.threads > most:
            found.append(
                f"torch computes with {self.threads} threads on {most:g} cores, which slows it; set "
                f"OMP_NUM_THREADS={max(1, int(most))}"
            )
        if self.memory_limit is not None and self.memory_bytes is not None:
            found.append(
                f"a limit of {gigabytes(self.memory_limit)} of {gigabytes(self.memory_bytes)} memory"
            )
        if not self.gpus:
            found.append("no GPU that this torch can use: trainings run on the CPU")
        busy = [g for g in self.gpus if g.free_bytes < 0.9 * g.total_bytes]
        found += [
            f"{g.name}: {gigabytes(g.free_bytes)} of {gigabytes(g.total_bytes)} are free, the rest is taken"
            for g in busy
        ]
        return found


def machine() -> Machine:
    """Look at this machine."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    memory = _meminfo()
    limit = memory_limit()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return Machine(
        cores=os.cpu_count(),
        usable_cores=len(affinity(0)) if affinity else None,
        cpu_quota=cpu_quota(),
        threads=torch.get_num_threads(),
        memory_bytes=memory.get("MemTotal") or _physical_bytes(),
        available_bytes=available_bytes(),
        memory_limit=limit,
        gpus=tuple(gpus),
    )


def available_bytes() -> int | None:
    """Memory that this process can still have without swapping, within its container's limit."""
    free = _meminfo().get("MemAvailable")
    for folder in _groups("memory"):
        most = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if most is None or used is None:
            continue
        cache = (
            _field(folder / "memory.stat", "inactive_file") or 0
        )  # given up when memory is short
        left = max(most - used + cache, 0)
        free = left if free is None else min(free, left)
    return free


def memory_limit() -> int | None:
    """The least limit of the control groups that this process is in; None where there is none."""
    total = _meminfo().get("MemTotal", math.inf)
    found = [
        _number(folder / name)
        for folder in _groups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    limits = [n for n in found if n is not None and n < total]
    return min(limits, default=None)


def cpu_quota() -> float | None:
    """Seconds of processor time that the control groups allow in a second; None where there is no quota."""
    quotas = []
    for folder in _groups("cpu"):
        text = _text(folder / "cpu.max").split()
        if len(text) == 2 and text[0].isdigit():
            quotas.append(int(text[0]) / int(text[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def gigabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.3g} GB"


def _groups(controller: str) -> list[Path]:
    """Folders of the control groups this process is in, with those above them (both versions)."""
    found = [CGROUPS, CGROUPS / controller]
    for line in _text(OWN_GROUP).splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        place = CGROUPS / controller if names else CGROUPS
        for part in Path(path.lstrip("/")).parts:
            if part == "..":  # a group outside of this container's view
                break
            place = place / part
            found.append(place)
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _meminfo() -> dict[str, int]:
    """Bytes by name; empty where the system has no such file."""
    rows = (line.split() for line in _text(MEMINFO).splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    rows = (line.split() for line in _text(path).splitlines())
    return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == name), None)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
