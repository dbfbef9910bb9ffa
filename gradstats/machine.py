"""What this machine offers a training: processors, memory, GPUs. Standard library, and torch when asked."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Gpu", "Machine", "available_bytes", "cpu_quota", "machine", "memory_limit"]

ROOT = Path("/")


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
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return Machine(
        cores=os.cpu_count(),
        usable_cores=len(affinity(0)) if affinity else None,
        cpu_quota=cpu_quota(),
        threads=torch.get_num_threads(),
        memory_bytes=_meminfo(ROOT).get("MemTotal") or _physical_bytes(),
        available_bytes=available_bytes(),
        memory_limit=memory_limit(),
        gpus=tuple(gpus),
    )


def available_bytes(root: Path = ROOT) -> int | None:
    """Memory that processes can still take without swapping, in bytes; None where the system does not say.

    The kernel's MemAvailable, or less where a control group (a container, version 1 or 2) this process is
    in, or one above it, may take less; pages of files that can be dropped count as free. `root`: where
    /proc and /sys are.
    """
    free = _meminfo(root).get("MemAvailable")
    if free is None:
        return None
    for group in _groups("memory", root):
        most = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if most is not None:
            used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
            stat = _table(group / "memory.stat")
            droppable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            free = min(free, most - used + droppable)
    return max(free, 0)


def memory_limit(root: Path = ROOT) -> int | None:
    """The least limit of the control groups that this process is in, where it is below the machine's."""
    total = _meminfo(root).get("MemTotal", math.inf)
    found = [
        _number(group / "memory.max", group / "memory.limit_in_bytes")
        for group in _groups("memory", root)
    ]
    return min((n for n in found if n is not None and n < total), default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Seconds of processor time that the control groups allow in a second; None where there is no quota."""
    quotas = []
    for group in _groups("cpu", root):
        parts = _text(group / "cpu.max").split()
        if len(parts) == 2 and parts[0].isdigit():
            quotas.append(int(parts[0]) / int(parts[1]))
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota and period:  # −1, which is no number here: none
            quotas.append(quota / period)
    return min(quotas, default=None)


def gigabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.3g} GB"


def _groups(controller: str, root: Path) -> list[Path]:
    """Folders of the control groups that this process is in, and of those above them."""
    found: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and controller not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if kinds else "")
        # Within a container the path is often the host's, which is not there: its own is then the top.
        group = top / path.strip("/")
        found += [group, *(p for p in group.parents if p.is_relative_to(top))]
    return list(dict.fromkeys(found))


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name; empty where the system has no such file."""
    return {name: 1024 * size for name, size in _table(root / "proc/meminfo").items()}


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Names with a number each, on a line each."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(*paths: Path) -> int | None:
    """That of the first file that holds one ("max" and −1 are none)."""
    texts = (_text(path).strip() for path in paths)
    return next((int(text) for text in texts if text.isdigit()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
