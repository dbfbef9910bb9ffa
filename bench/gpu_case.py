"""What a case of `gpu.py` is: inputs made several times over, a check, and calls to time.

On a card a timed call is the replay of a CUDA graph that holds the operation once for each of the
inputs: launching many a small kernel from Python takes longer than running it, and a training step
hides that behind the kernels before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradstats.errors import first_line

ROTATE_BYTES = 512 * 2**20  # inputs in rotation: several times the L2 cache
FEW = 2  # samples that are compared with float64
BF16_TOLERANCE, FP32_TOLERANCE = 2e-3, 1e-5
Call = Callable[[], Any]
Make = Callable[[], Sequence[Tensor]]


@dataclass
class Case:
    """`base` and `variants` are timed in turns; `limits` are of the ratio to the base."""

    base: tuple[str, Call]
    variants: dict[str, Call]
    limits: dict[str, float] = field(default_factory=dict)
    bytes_moved: int = 0  # that the task must move at least, for GB/s
    flops: int = 0
    check: Callable[[], float] = lambda: 0.0
    tolerance: float = BF16_TOLERANCE
    remarks: dict[str, str] = field(default_factory=dict)
    warmup: int = 2
    per_call: int = 1  # times that a call does the operation


# Named before it is made: what fails while a case is made has a name then.
Cases = Iterator[tuple[str, Callable[[], Case]]]


def operation(make: Make, runs: dict[str, Callable[..., Any]], **rest: Any) -> Case:
    """A case of `runs`, the first of them the base, all on one rotation of inputs."""
    pool = [make()]
    if pool[0][0].is_cuda:
        size = sum(t.numel() * t.element_size() for t in pool[0])
        pool += [make() for _ in range(min(15, ROTATE_BYTES // size))]
        try:
            calls = {name: captured(run, pool) for name, run in runs.items()}
            return _case(calls, per_call=len(pool), **rest)
        except Exception as error:  # one of them alone would not be comparable
            print(f"launched one by one, for a graph was refused: {first_line(error)}")
            torch.cuda.synchronize()

    def call(run: Callable[..., Any]) -> Call:
        turn = itertools.cycle(pool)
        return lambda: run(*next(turn))

    return _case({name: call(run) for name, run in runs.items()}, **rest)


def _case(calls: dict[str, Call], **rest: Any) -> Case:
    base, *others = calls.items()
    return Case(base, dict(others), **rest)


def captured(run: Callable[..., Any], pool: Sequence[Sequence[Tensor]]) -> Call:
    """Replays a graph of one run on each of the inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*pool[0])  # compiles, and makes what libraries keep
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in pool:
            run(*inputs)
    kept = (graph, run, pool)  # what the graph reads and writes has to stay where it is
    return lambda: kept[0].replay()


def worst(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Largest relative error of several statistics; infinite where one is not a number."""
    errors = [0.0]
    for a, b in zip(found, true, strict=True):
        if b.numel():
            scale = b.abs().max().clamp_min(1e-300)
            error = float((a.double() - b).abs().max() / scale)
            errors.append(error if error == error else float("inf"))
    return max(errors)
