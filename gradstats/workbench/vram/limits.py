"""How much memory a process may take, holding it to that, and what it took."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gradstats.errors import GradStatsError
from gradstats.machine import available_bytes

__all__ = ["CpuMemory", "CudaMemory", "memory_of", "ran_out"]

# What allocators, oneDNN and OpenMP say where memory (or the address space for a thread's stack) is short.
SHORT = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "memoryerror",
    "could not create a memory",
    "could not create a primitive",
    "can't start new thread",
    "resource temporarily unavailable",
    "failed to allocate",
    "unable to allocate",
)


def ran_out(error: BaseException | str) -> bool:
    """Whether an error, or what a process that died wrote, says that memory was short."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error).lower() for words in SHORT)


def memory_of(device: torch.device) -> CpuMemory | CudaMemory:
    """The memory of a device that steps run on.

    Raises GradStatsError for a device whose peak memory cannot be told.
    """
    if device.type == "cuda":
        return CudaMemory(device)
    if device.type == "cpu" and sys.platform == "linux":
        return CpuMemory()
    raise GradStatsError(
        f"memory on {device.type} ({sys.platform}) can be neither limited nor measured here; "
        "CUDA devices can, and CPUs on Linux"
    )


class CpuMemory:
    """The memory of this process.

    Two things hold it, because neither is enough alone. RLIMIT_DATA bounds private writable memory
    (heap, anonymous maps, thread stacks): torch's allocator finds out at once, in whichever thread, and
    raises where a page fault beyond physical memory would have the kernel kill the process. RLIMIT_AS
    would count what is only reserved too: mapped libraries (gigabytes for CUDA builds of torch) and
    malloc's 64 MB of addresses for every thread. RLIMIT_RSS does nothing on Linux. But the data limit
    leaves out the pages of libraries and mapped files, so afterwards the peak resident memory (VmHWM,
    what a container is charged for, over all threads) is compared with the limit as well.
    """

    name = "cpu"

    def total(self) -> int:
        """What this process may have: its share of what is available, and what it has already."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says it
        return (available_bytes() or 0) // ranks + _status("VmRSS")

    def hold(self, limit: int) -> None:
        """Have allocations beyond the limit fail from here on."""
        import resource

        resource.setrlimit(
            resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )

    def clear(self) -> None:
        """Give back to the system what malloc keeps for later, so that the next size starts as if alone."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)

    def peak(self) -> int:
        """Most resident memory of this process since it began; with what the system swapped out."""
        return _status("VmHWM") + _status("VmSwap")

    def details(self) -> dict[str, int]:
        return {}

    def wait(self) -> None:
        """Steps on the CPU are done when they return."""


class CudaMemory:
    """What torch's allocator takes of one card.

    The context and what libraries allocate by themselves are taken off first: the budget counts from what
    is free after the context is there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def total(self) -> int:
        """What is free, with what the allocator holds already."""
        self.wait()
        return int(torch.cuda.mem_get_info(self.device)[0]) + torch.cuda.memory_reserved(
            self.device
        )

    def hold(self, limit: int) -> None:
        """Have the allocator raise OutOfMemoryError beyond the limit, before a driver spills to the host."""
        size = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / size), self.device)

    def clear(self) -> None:
        """Give back what the allocator keeps for later, and forget the peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most that the allocator had reserved, unused parts of its blocks included."""
        return torch.cuda.max_memory_reserved(self.device)

    def details(self) -> dict[str, int]:
        stats: dict[str, Any] = torch.cuda.memory_stats(self.device)
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "retries": int(stats.get("num_alloc_retries", 0)),
        }

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
