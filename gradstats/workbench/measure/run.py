"""`measure`: real steps of a workload with a monitor attached, after which all is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from gradstats.attaching import attach
from gradstats.estimators import DEFAULT_HALF_LIFE, require, whole
from gradstats.kept import kept
from gradstats.loggers import Sink
from gradstats.monitor import Monitor
from gradstats.workbench.measure.parts import Report, Run
from gradstats.workbench.measure.result import Measurement, Settings
from gradstats.workbench.workload import Workload

__all__ = ["measure"]

DEFAULT_BATCH_SIZE = 32  # where neither the workload nor the caller names one


def measure(
    workload: Workload,
    *,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    steps: int = 100,
    precision: float | None = None,
    frozen: bool = False,
    method: str = "per_sample",
    sample: str = "example",
    every: int = 1,
    geometry: Sequence[str] = (),
    half_life: float | None = None,
    confidence: float = 0.9,
    seed: int = 0,
    overhead: bool = True,
    timing: bool = True,
    row_every: int = 10,
    sinks: Sequence[Sink] = (),
    report: Report | None = None,
) -> Measurement:
    """Measure the gradient noise scale of a workload over real training steps, and what that costs.

    Model, optimizer and random numbers are put back to the bit when it returns or raises.

    Args:
        batch_size: samples per optimizer step, at most those of the data (default: the workload's, else
            32, or all).
        micro_batch_size: samples at once, a divisor of `batch_size` (default: all of them).
        steps: optimizer steps, at most.
        precision: end once the interval's ends differ by no more than this factor, looked at every
            `row_every` steps from step 30 on.
        frozen: measure at the weights as they are, without updates; all steps then count alike.
        method, sample, every, geometry, half_life, confidence: as for `gradstats.attach`; "adam" and
            "sign" in `geometry` measure elementwise variances too. `half_life` is by default that of
            `attach`, and infinite where `frozen`. Method "ranks" needs a training of several processes,
            and is refused.
        seed: of the order of the data, and of torch's random numbers.
        overhead: time plain against measured steps (see `Overhead`).
        timing: time steps at several batch sizes (`gradstats.measure_step`), so that the advice weighs
            time too. Sizes from a quarter to four times the batch, or up to `micro_batch_size` where
            that is given.
        row_every: steps between rows of the log.
        sinks: get each row, as those of `gradstats.Log` do.
        report: called with `Progress` as it goes.

    Ctrl-C ends it early; what was measured until then is returned, with `stopped` "interrupted".

    Raises:
        InvalidArgumentError: an argument is out of range.
        GradStatsError: the model cannot be measured like this, or a step of the workload failed.
    """
    default = workload.batch_size or min(DEFAULT_BATCH_SIZE, workload.num_samples)
    size = whole("batch_size", batch_size, default)
    held = workload.num_samples
    require(size <= held, "batch_size", size, f"the data has {held} samples, each once in a batch")
    micro = whole("micro_batch_size", micro_batch_size, size)
    require(size % micro == 0, "micro_batch_size", micro, f"pass a divisor of batch_size={size}")
    require(method != "ranks", "method", method, "it needs a training of several processes")
    apart = method != "micro_batch" or micro < size
    require(
        apart, "micro_batch_size", micro_batch_size, 'method="micro_batch" compares several a step'
    )
    whole("steps", steps)
    whole("row_every", row_every)
    require(precision is None or precision > 1, "precision", precision, "pass a factor above 1")
    optimizer = cast(torch.optim.Optimizer, workload.optimizer)
    settings = Settings(
        batch_size=size,
        micro_batch_size=micro,
        method=method,
        sample=sample,
        frozen=frozen,
        every=every,
        seed=seed,
        data_samples=workload.num_samples,
        optimizer=type(optimizer).__name__,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        betas=optimizer.param_groups[0].get("betas"),
        device=str(workload.device),
        batch_norm=workload.batch_norm_layers,
    )
    if half_life is None:
        half_life = float("inf") if frozen else DEFAULT_HALF_LIFE
    options = {"method": method, "sample": sample, "moments": bool(set(geometry) - {"plain"})}

    def attached(**more: Any) -> Monitor:
        return attach(workload.model, optimizer=workload.optimizer, **options, **more)  # type: ignore[arg-type]

    put_back = kept([workload.model, workload.optimizer])
    run = Run(workload, settings, report or (lambda _: None))
    try:
        torch.manual_seed(seed)
        workload.model.zero_grad()
        kinds = dict.fromkeys(("plain", *geometry))
        with run.monitored(
            attached(every=every, geometry=list(kinds), half_life=half_life, confidence=confidence)
        ) as monitor:
            run.train(monitor, steps, precision, row_every, sinks)
            if overhead:
                run.compare(attached(every=2))
            if timing:
                run.time(whole_batches=micro_batch_size is None)
        return run.result(monitor, geometry)
    finally:
        put_back()
