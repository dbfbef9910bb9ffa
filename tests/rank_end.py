"""How a process of elastic_training.py, which trained with others by DDP over gloo, ends."""

from __future__ import annotations

import gc
from pathlib import Path

import torch.distributed as dist

# DDP imports this module, whose functions have the default group of that moment as their default
# argument. After init_process_group, they would hold the group, and so gloo's threads, until the
# interpreter clears its modules. A thread that asks for the GIL that late, to let go of a tensor, is
# ended by Python inside a destructor, and "terminate called without an active exception" aborts the
# process: in plain torch too (pytorch/pytorch issue 190489).
import torch.distributed.nn  # noqa: F401


def leave() -> None:
    """Let go of the process group, and with it of the threads that work for it."""
    dist.destroy_process_group()
    gc.collect()  # models in DDP hold it, in cycles
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    left = [name for name in names if name.startswith("pt_gloo")]
    assert not left, f"{len(left)} threads of gloo's outlive their process group"
