"""Trials on a Ray cluster. What they keep comes back to this process, so no disk need be shared."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradstats.errors import GradStatsError, first_line
from gradstats.workbench.sweep.runners import Setup, handle
from gradstats.workbench.sweep.training import train
from gradstats.workbench.sweep.trial import Event, Trial

__all__ = ["on_ray"]


def on_ray(trials: Sequence[Trial], setup: Setup, address: str, *, gpus: int = 0) -> None:
    """As many trials at a time as the cluster has room for; each takes its threads as CPUs, and `gpus`.

    `address`: of a running cluster, or "local" for one on this machine that ends with the sweep. The nodes
    of a running one need gradstats; the folder the command runs in goes to them, so that they can import
    the factory.

    Raises GradStatsError where ray is missing or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise GradStatsError(
            f"trials on a Ray cluster need ray ({error}); run `pip install 'gradstats[ray]'`"
        ) from error
    paths = os.pathsep.join(str(Path(p or ".").resolve()) for p in sys.path)
    local = address == "local"
    where: dict[str, Any] = (
        {"env_vars": {"PYTHONPATH": paths}} if local else {"working_dir": str(Path.cwd())}
    )
    mine = not ray.is_initialized()
    try:
        ray.init(
            address=address if mine else None,
            runtime_env=where,
            ignore_reinit_error=True,
            include_dashboard=False if local else None,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GradStatsError(f"the Ray cluster cannot be reached: {first_line(error)}") from error
    try:
        _follow(ray, trials, setup, gpus)
    finally:
        if mine:
            ray.shutdown()


def _events(trial: Trial, state: bytes | None, seconds: float) -> Iterator[Event]:
    """Runs on the cluster."""
    yield from train(trial, state, lambda: False, seconds)


def _follow(ray: Any, trials: Sequence[Trial], setup: Setup, gpus: int) -> None:
    remote = ray.remote(_events)

    def begin(trial: Trial) -> Any:
        options = {"num_cpus": trial.threads, "num_gpus": gpus, "max_retries": 0}
        task = remote.options(num_returns="streaming", **options)
        return task.remote(trial, setup.store.checkpoint(trial.name), setup.seconds)

    running = {begin(trial): (trial, 1) for trial in trials}
    while running and not setup.stop():
        ready, _ = ray.wait(list(running), num_returns=1, timeout=0.2)
        for stream in ready:
            trial, tries = running[stream]
            try:
                event = ray.get(next(stream))
            except StopIteration:
                running.pop(stream)
                continue
            except ray.exceptions.RayError as error:
                running.pop(stream)
                cause = getattr(error, "cause", None) or error
                again = setup.failed_try(trial, first_line(cause), tries)
                if again is not None:
                    running[begin(trial)] = again
                continue
            handle(setup.store, trial, event)
            if event.kind in ("point", "result"):
                setup.report(trial, event.content)
    for stream in running:
        ray.cancel(stream, force=True)
