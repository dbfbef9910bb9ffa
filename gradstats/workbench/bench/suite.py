"""The whole benchmark of a machine: ceilings, operations and steps, for each number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradstats import backends
from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.estimators import whole
from gradstats.workbench import saved
from gradstats.workbench.bench import ops, steps
from gradstats.workbench.bench.ceilings import Ceilings, measure_ceilings
from gradstats.workbench.bench.files import Timed
from gradstats.workbench.bench.models import MODELS
from gradstats.workbench.bench.own import bench_step
from gradstats.workbench.bench.peers import PACKAGES, PEERS
from gradstats.workbench.bench.steps import KINDS, PLAIN, Variant
from gradstats.workbench.bench.timing import Spread, interleave, ratios
from gradstats.workbench.workload import Workload

__all__ = ["Suite", "bench"]

TORCH = "torch"


@dataclass(frozen=True)
class Suite:
    """What was timed, for `gradstats.workbench.bench.files.write`, and the content of its file."""

    timed: tuple[Timed, ...]
    ceilings: tuple[Ceilings, ...]
    environment: dict[str, Any]

    def rows(self, what: str) -> list[dict[str, Any]]:
        """The rows of "ops" or "steps"."""
        return [dict(each.extra) for each in self.timed if ("op" in each.extra) == (what == "ops")]

    def to_dict(self) -> dict[str, Any]:
        return {
            "ops": self.rows("ops"),
            "steps": self.rows("steps"),
            "ceilings": [ceilings.to_dict() for ceilings in self.ceilings],
            "environment": self.environment,
        }


def bench(
    *,
    operations: Sequence[str] | None = None,
    models: Sequence[str] = ("mlp", "cnn", "gpt"),
    workload: Workload | None = None,
    name: str = "workload",
    peers: Sequence[str] = tuple(PEERS),
    threads: Sequence[int] = (),
    rounds: int = 15,
    quick: bool = False,
    device: str | None = None,
    progress: Callable[[str, float], object] = lambda what, done: None,
    keep: Callable[[Suite], object] = lambda suite: None,
) -> Suite:
    """Time operations and whole steps on this machine.

    Every operation is checked against float64 before it is timed, in turns with torch's own kernel for
    the same gradients; every step in turns with the plain step of the same model, and with those of the
    other tools that are installed. Beside them stand the bandwidth and the matrix throughput measured in
    the same run: `of_ceiling` is the least time that the gradients' own work could take at them over the
    time taken (above 1 where the data stay in the caches).

    Args:
        operations: of `gradstats.workbench.bench.ops.SHAPES`. Default: all; () for none.
        models: standard models to time whole steps of; () for none.
        workload: a training of the user's to time the step of too, called `name`, on one batch.
        peers: other tools, of `gradstats.workbench.bench.peers.PEERS`.
        threads: numbers of threads to do all of it with. Default: as torch has it now.
        rounds: turns of each variant.
        quick: one shape of each operation, small models and few rounds: what runs, and no figures to trust.
        device: "cpu" (float32) or "cuda" (operations in bfloat16). Default: CUDA where there is one.
        progress: called progress(what, done) with a text and the part done, from 0 to 1.
        keep: called with what there is after each operation and model.

    Raises InvalidArgumentError for names that are not known, GradStatsError where an operation is wrong.
    """
    wanted = list(ops.SHAPES) if operations is None else list(operations)
    _known("ops", wanted, ops.SHAPES)
    _known("models", models, MODELS)
    _known("peers", peers, PEERS)
    rounds = min(whole("rounds", rounds), 3) if quick else whole("rounds", rounds)
    numbers = [whole("threads", n) for n in threads] or [torch.get_num_threads()]
    if workload is not None and workload.batch_size is None:
        raise InvalidArgumentError(
            "the batch size to time is not known; pass --batch-size, or a workload that has one"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    timed: list[Timed] = []
    ceilings: list[Ceilings] = []
    environment = saved.environment(*PACKAGES)
    shapes = [pair for pair in ops.names() if pair[0] in wanted]
    if quick:
        shapes = list({op: (op, shape) for op, shape in reversed(shapes)}.values())[::-1]
    parts = len(numbers) * (1 + len(shapes) + 4 * len(models) + 4 * (workload is not None))
    done = 0.0

    def step(what: str, weight: int) -> None:
        nonlocal done
        done += weight / parts
        keep(Suite(tuple(timed), tuple(ceilings), environment))
        progress(what, done)

    try:
        for n in numbers:
            torch.set_num_threads(n)
            size = 512 if quick else 8192 if device == "cuda" else 2048
            progress(f"ceilings of {n} threads", done)
            ceilings.append(
                measure_ceilings(
                    rounds=rounds,
                    matrix_size=size,
                    array_bytes=2**22 if quick else None,
                    device=device,
                )
            )
            step("ceilings", 1)
            for op, shape in shapes:
                timed += _op(op, shape, rounds, 0.0 if quick else 0.02, ceilings[-1], device)
                step(f"{op} {shape}, {n} threads", 1)
            turn = 0.0 if quick else 0.1
            for model in models:
                rows = steps.measure(
                    model, rounds, peers, tiny=quick, turn_seconds=turn, device=device
                )
                timed += _steps(model, rows, n)
                step(f"steps of {model}, {n} threads", 4)
            if workload is not None:
                timed += _steps(name, _own(workload, rounds, turn), n)
                step(f"steps of {name}, {n} threads", 4)
    finally:
        torch.set_num_threads(before)
    return Suite(tuple(timed), tuple(ceilings), environment)


def _own(workload: Workload, rounds: int, turn_seconds: float) -> list[Variant]:
    size = workload.batch_size
    assert size is not None
    assert isinstance(workload.optimizer, torch.optim.Optimizer)
    found = bench_step(
        workload.model,
        workload.loss_fn,
        next(workload.batches(size)),
        optimizer=workload.optimizer,
        rounds=rounds,
        turn_seconds=turn_seconds,
    )
    return list(found.variants)


def _op(
    op: str, shape: str, rounds: int, turn: float, ceilings: Ceilings, device: str
) -> list[Timed]:
    operation = ops.make(op, ops.SHAPES[op][1][shape], device)
    kinds = KINDS[:1] if operation.as_list else KINDS
    for i, kind in enumerate(kinds):
        error = operation.error(bool(i))
        if not error <= 1:
            raise GradStatsError(
                f"{op} {shape} with {kind} is {error:.1f} times further from the float64 truth than its "
                "tolerance, so it was not timed; GRADSTATS_BACKEND=reference is an implementation to compare"
            )
    calls = {TORCH: operation.torch()} | {k: operation.ours(bool(i)) for i, k in enumerate(kinds)}
    seconds = interleave(calls, rounds=rounds, turn_seconds=turn, device=device)
    ratio = ratios(seconds, TORCH)
    least, limit = ceilings.seconds(operation.bytes, operation.flops)
    found = []
    for kind, times in seconds.items():
        spread = Spread.of(times)
        backend = TORCH
        if kind != TORCH:
            backend = backends.choose(operation.name, device, ops.dtype_on(device))
        extra = {
            "op": op,
            "shape": shape,
            "variant": kind,
            "name": f"{op} {shape} {kind}",
            "backend": backend,
            "threads": ceilings.threads,
            "seconds": spread.median,
            "reference": TORCH,
            "reference_seconds": Spread.of(seconds[TORCH]).median,
            **_ratio(ratio[kind]),
            "bytes_per_second": operation.bytes / spread.median,
            "flops_per_second": operation.flops / spread.median,
            "of_ceiling": least / spread.median,
            "limit": limit,
        }
        name = f"{op} {shape} {kind}, threads {ceilings.threads}"
        found.append(Timed(f"{op} {shape}", name, tuple(times), extra))
    return found


def _steps(model: str, rows: Sequence[Variant], threads: int) -> list[Timed]:
    found = []
    for row in rows:
        extra: dict[str, Any] = {
            "model": model,
            "variant": row.name,
            "threads": threads,
            "status": row.status,
            "note": row.note,
            "reference": PLAIN,
            "seconds": None,
            "ratio": None,
        }
        if row.seconds is not None and row.ratio is not None:
            extra |= {"seconds": row.seconds.median, **_ratio(row.ratio)}
        name = f"step {model} {row.name}, threads {threads}"
        found.append(Timed(f"step {model}", name, row.rounds, extra))
    return found


def _ratio(spread: Spread) -> dict[str, float]:
    return {"ratio": spread.median, "ratio_low": spread.low, "ratio_high": spread.high}


def _known(name: str, given: Sequence[str], known: Any) -> None:
    if unknown := [each for each in given if each not in known]:
        raise InvalidArgumentError(
            f"{name} {', '.join(unknown)} are not known here; use {', '.join(known)}"
        )
