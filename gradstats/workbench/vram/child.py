"""The fresh process in which steps are tried: `python -m gradstats.workbench.vram.child DESCRIPTOR`.

Reads what to do as one JSON object from standard input, and writes a JSON line to the file descriptor
for everything that happens, before it can die of the next.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

Emit = Callable[..., None]


def main() -> None:
    descriptor, todo = int(sys.argv[1]), json.load(sys.stdin)

    def emit(**event: Any) -> None:
        os.write(descriptor, (json.dumps(event) + "\n").encode())

    from gradstats.errors import GradStatsError, first_line
    from gradstats.workbench.vram.limits import end_with_parent, ran_out

    end_with_parent()
    try:
        _try_sizes(todo, emit)
    except Exception as error:
        ours = isinstance(error, GradStatsError)
        emit(
            event="error",
            memory=ran_out(error),
            kind=type(error).__name__,
            text=str(error) if ours else first_line(error),
            ours=ours,
        )
    emit(event="end")  # a process that this one leaves behind may keep the descriptor open


def _try_sizes(todo: dict[str, Any], emit: Emit) -> None:
    from gradstats.workbench.vram.limits import memory_of
    from gradstats.workbench.vram.sizes import show_bytes
    from gradstats.workbench.workload import load

    made = load(todo["target"], seed=todo["seed"])
    memory = memory_of(made.device)
    budget = todo["budget"] or memory.total()
    limit = int(budget * todo["share"])
    loaded = memory.peak()
    emit(event="loaded", device=memory.name, budget=budget)
    if loaded > limit:
        raise MemoryError(
            f"with the model and its data loaded the process has taken {show_bytes(loaded)}, and may "
            f"have {show_bytes(limit)} ({todo['share']:.0%} of {show_bytes(budget)})"
        )
    memory.hold(limit)
    with _monitored(made, todo["plain"]) as monitor:
        first = None
        for size in todo["sizes"]:
            emit(event="begin", size=size)
            memory.clear()
            seconds = _steps(made, monitor, memory, size, todo["steps"])
            peak = memory.peak()
            emit(
                event="size",
                size=size,
                peak=peak,
                seconds=seconds,
                ok=peak <= limit,
                model=_model_bytes(made),
                **memory.details(),
            )
            # The first steps import and allocate what all have; the sizes share what that leaves.
            first = peak if first is None else first
            if peak > first + todo["enough"] * (limit - first) or seconds > todo["most_seconds"]:
                return


def _monitored(made: Any, plain: bool) -> Any:
    if plain:
        return nullcontext()
    import gradstats

    return gradstats.attach(made.model, optimizer=made.optimizer)


def _steps(made: Any, monitor: Any, memory: Any, size: int, steps: int) -> float:
    """Whole training steps at one size; the fastest one's seconds."""
    draw, times = made.batches(size), []
    for _ in range(steps):
        batch = next(draw)
        start = time.perf_counter()
        made.loss(batch).backward()
        if monitor is not None:
            monitor.step()
        made.optimizer.step()
        made.optimizer.zero_grad()
        memory.wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _model_bytes(made: Any) -> int:
    """Parameters, buffers, a gradient for each trained parameter, and the optimizer's state."""
    import torch

    params = list(made.model.parameters())
    held = [*params, *made.model.buffers(), *(p for p in params if p.requires_grad)]
    held += [v for state in made.optimizer.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


if __name__ == "__main__":
    main()
