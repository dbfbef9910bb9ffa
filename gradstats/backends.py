"""Which implementation of the statistics operations runs, and why.

`reference` is plain PyTorch and runs everywhere. `cpu` is the C++ extension, `triton` the kernels of
`gradstats.kernels`, `cuda` the CUDA C++ part of the extension. An automatic choice takes the fastest
one that serves the device, the dtype and the operation (rows too wide for a kernel of Triton's are the
reference's); a backend asked for by name (`use`, or the environment variable GRADSTATS_BACKEND) runs or
raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, get_args

import torch

from gradstats import reference
from gradstats.errors import BackendError, InvalidArgumentError

Name = Literal["auto", "reference", "cpu", "triton", "cuda"]
NAMES: tuple[str, ...] = get_args(Name)

_TRITON = (  # in a module of gradstats.kernels of the same name
    "linear_stats", "layer_norm_stats", "group_norm_stats", "embedding_stats", "conv_stats",
    "tied_cross",
)  # fmt: skip
_CUDA = ("multi_sq_norm",)
# Never run on a GPU yet, so an automatic choice takes Triton; use("cuda") takes these.
_CUDA_BY_NAME = ("linear_stats",)
_CPU = (
    "linear_stats", "layer_norm_stats", "group_norm_stats", "embedding_stats", "conv_stats",
    "multi_sq_norm",
)  # fmt: skip
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)

_forced: str | None = None
_wanted = os.environ.get("GRADSTATS_BACKEND") or "auto"  # as `forced` last saw it
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks at it on import, too


@cache
def extension() -> tuple[Any | None, str]:
    """The compiled extension and how it was built, or None and why there is none."""
    try:
        module = importlib.import_module("gradstats._C")
        _tell(module)
    except ImportError as error:
        return None, (
            f"the C++ extension is not available ({error}); build it with "
            "`GRADSTATS_BUILD=cpu pip install --no-build-isolation -e .`"
        )
    return module, "built for torch {torch}, {cpu_capability}".format(**module.build_info)


@cache
def triton_available() -> tuple[bool, str]:
    """Whether Triton can be imported (it is not imported here)."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; `pip install triton`"
    return True, "installed"


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors, under its interpreter."""
    return _INTERPRETING


def forced() -> str:
    """The backend asked for by name, or `auto`."""
    global _wanted
    name = _forced if _forced is not None else (os.environ.get("GRADSTATS_BACKEND") or "auto")
    if name not in NAMES:
        raise InvalidArgumentError(
            f"backend {name!r} does not exist; GRADSTATS_BACKEND and use() take {', '.join(NAMES)}"
        )
    _wanted = name
    module = sys.modules.get("gradstats._C")
    if module is not None:
        _tell(module)
    return name


def _tell(module: Any) -> None:
    """Tell the extension whether it computes the statistics in the backward of its own nodes."""
    if hasattr(module, "compute_here"):  # an older build has no nodes
        module.compute_here(serves("cpu"))


@contextmanager
def use(name: Name) -> Iterator[None]:
    """Run the statistics operations on one backend for a while, or raise where it cannot run."""
    global _forced
    before, _forced = _forced, name
    try:
        forced()
        yield
    finally:
        _forced = before
        forced()


def refusal(name: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run `op` on such tensors, or None where it can."""
    if name == "reference":
        return None
    if name == "triton":
        available, why = triton_available()
        if not available:
            return why
        if op not in _TRITON:
            return f"there is no Triton kernel for {op}"
        if dtype not in _GPU_DTYPES:
            return f"its kernels take {_list(_GPU_DTYPES)}, not {dtype}"
        if device == "cuda" or (device == "cpu" and interpreting()):
            return None
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), not {device} ones"
    module, why = extension()
    if module is None:
        return why
    if device != name:
        return f"it needs {name} tensors, not {device} ones"
    if name == "cuda" and not _has_cuda(op):
        return f"the extension has no CUDA kernel for {op}; build it with GRADSTATS_BUILD=cuda"
    takes = _GPU_DTYPES if op in _CUDA else _TENSOR_CORE_DTYPES
    if name == "cuda" and dtype not in takes:
        return f"its kernels take {_list(takes)}, not {dtype}"
    if name == "cpu" and op not in _CPU:
        return f"the extension has no CPU kernel for {op}"
    if name == "cpu" and dtype not in _CPU_DTYPES and op != "multi_sq_norm":
        return f"its kernels take {_list(_CPU_DTYPES)}, not {dtype}"
    return None


def _has_cuda(op: str) -> bool:
    module, _ = extension()
    return op in (*_CUDA, *_CUDA_BY_NAME) and hasattr(module, f"{op}_cuda")


def _list(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def choose(op: str, device: str, dtype: torch.dtype) -> str:
    """The name of the backend that runs `op` on tensors of this device type and dtype."""
    return _choose(op, device, dtype, forced())


def implementation(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` for tensors like this one.

    Goes by what `forced` last returned: the environment takes longer to read than a small layer.
    """
    return _resolve(op, tensor.device.type, tensor.dtype, _wanted)


def serves(name: str) -> bool:
    """Whether backend `name` may serve at all: nobody asked for another."""
    return _wanted in ("auto", name)


def compiled(name: str) -> Callable[..., Any] | None:
    """The extension's function `name`, for CPU tensors, where nobody asked for another backend."""
    return getattr(extension()[0], name, None) if serves("cpu") else None


def native(name: str, op: str, tensor: torch.Tensor) -> Callable[..., Any] | None:
    """The extension's function `name`, where the extension runs `op` on the CPU for such tensors."""
    return _native(name, op, tensor.device.type, tensor.dtype, _wanted)


@cache
def _native(
    name: str, op: str, device: str, dtype: torch.dtype, wanted: str
) -> Callable[..., Any] | None:
    serves = device == "cpu" and _choose(op, device, dtype, wanted) == "cpu"
    return getattr(extension()[0], name, None) if serves else None  # an older build has it not


@cache
def _resolve(op: str, device: str, dtype: torch.dtype, wanted: str) -> Callable[..., Any]:
    name = _choose(op, device, dtype, wanted)
    module: Any = extension()[0]
    if name == "triton":
        module = importlib.import_module(f"gradstats.kernels.{op}")
        if wanted == "auto" and hasattr(module, "MAX_WIDTH"):
            return partial(_by_width, getattr(module, op), getattr(reference, op), module.MAX_WIDTH)
    elif name == "reference":
        module = reference
    return getattr(module, f"{op}_cuda" if name == "cuda" else op)  # type: ignore[no-any-return]


def _by_width(
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    most: int,
    first: torch.Tensor,
    *rest: Any,
) -> Any:
    """An automatic choice leaves rows that are too wide for a kernel to the reference."""
    return (kernel if first.shape[-1] <= most else plain)(first, *rest)


def _choose(op: str, device: str, dtype: torch.dtype, wanted: str) -> str:
    # A backend asked for by name serves the operations it has; the others stay automatic.
    has = {"triton": op in _TRITON, "cuda": op in _CUDA or _has_cuda(op), "cpu": op in _CPU}
    if wanted != "auto" and has.get(wanted, True):
        why = refusal(wanted, op, device, dtype)
        if why is None:
            return wanted
        raise BackendError(
            f"backend {wanted!r} was asked for and cannot run {op}: {why}. "
            "Unset GRADSTATS_BACKEND (or use('auto')) to let gradstats choose."
        )
    for name in ("cuda", "cpu", "triton"):
        if name == "triton" and device == "cpu":
            continue  # the interpreter is for tests, never an automatic choice
        if name == "cuda" and op in _CUDA_BY_NAME:
            continue
        if refusal(name, op, device, dtype) is None:
            return name
    return "reference"
