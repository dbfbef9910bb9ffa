"""What the host side of every kernel shares: checks, the launch, small numbers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_SMS, DEFAULT_ARCH = 132, 90  # an H100 or H200: to plan for a device that is not there


def refuse(op: str, saw: str, instead: str) -> NoReturn:
    """Raise BackendError: what was seen, and what to do."""
    from gradstats.errors import BackendError  # here: kernels must load without the rest

    raise BackendError(f"{op} (triton): {saw}. {instead}.")


def check_inputs(op: str, **tensors: Tensor | None) -> None:
    """Refuse dtypes that the kernels do not compute in, and tensors on different devices."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        if t.dtype not in DTYPES:
            refuse(op, f"{name} has dtype {t.dtype}", "Supported: float32, bfloat16, float16; "
                   "backend 'reference' also takes float64")  # fmt: skip
    devices = {name: str(t.device) for name, t in given.items()}
    if len(set(devices.values())) > 1:
        refuse(op, f"inputs are on different devices: {devices}", "Move them to one device")


def in_step(t: Tensor) -> bool:
    """Whether rows of (B, T, features) can be read in runs of 16 bytes and more."""
    inner = 2 if t.stride(2) == 1 else 1
    if t.element_size() > 2:
        return True
    if t.stride(inner) != 1 or t.shape[inner] % 16 != 0 or t.data_ptr() % 16 != 0:
        return False
    return all(t.stride(d) % 16 == 0 for d in (0, 3 - inner))


def loadable(t: Tensor) -> Tensor:
    """(B, T, features) as it is, or copied with zero padding if 16-bit rows are out of step.

    Asynchronous copies move 4 to 16 bytes: other rows would go through registers, two bytes at a
    time, and spill them. One copy costs less than that for every tile.
    """
    if in_step(t):
        return t
    batch, positions, width = t.shape
    padded = t.new_empty(batch, positions, cdiv(width, 16) * 16)
    padded[..., :width] = t
    padded[..., width:] = 0
    return padded


@functools.lru_cache
def _planned_for(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, 10 * found.major + found.minor


def planned_for(like: Tensor) -> tuple[int, int]:
    """Multiprocessors and compute capability of the tensor's device, for planning."""
    return _planned_for(like.device.index) if like.is_cuda else (DEFAULT_SMS, DEFAULT_ARCH)


def num_sms(like: Tensor) -> int:
    return planned_for(like)[0]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launch(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], num_warps: int, num_stages: int = 1
) -> None:
    """Launch on the device of the arguments. Static checks replace this to see what would run."""
    import triton  # here: choosing a configuration must not need it

    device = next(a.device for a in args.values() if isinstance(a, Tensor))
    if device.type != "cuda" and isinstance(kernel, triton.runtime.JITFunction):
        refuse(kernel.__name__, f"tensors are on {device}", "Move them to a CUDA device, choose "
               "another backend, or set TRITON_INTERPRET=1 before importing it")  # fmt: skip
    # Triton launches on the current device, which need not be the tensors' own.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    run: Callable[..., Any] = kernel[grid]
    with guard:
        run(**args, num_warps=num_warps, num_stages=num_stages)
