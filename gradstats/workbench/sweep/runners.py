"""Trials, one after the other in this process or in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from gradstats.errors import InvalidArgumentError, first_line
from gradstats.kept import kept
from gradstats.workbench.sweep.store import Store
from gradstats.workbench.sweep.training import train
from gradstats.workbench.sweep.trial import Event, Trial

__all__ = ["Report", "Setup", "handle", "here", "in_processes", "interruptible", "undisturbed"]

TRIES = 2  # a trial that fails is tried once more, from its last checkpoint
GRACE = 30.0  # seconds that a process gets to write its checkpoint
Report = Callable[[Trial, dict[str, Any]], None]  # a trial's news: a point, or {"why": ...}


@dataclass
class Setup:
    """What the runners share: where results go, when to stop, whom to tell.

    `failed`: of the trials that failed `TRIES` times, why.
    """

    store: Store
    stop: Callable[[], bool]
    report: Report
    seconds: float = 10.0  # between checkpoints
    failed: dict[str, str] = field(default_factory=dict)

    def failed_try(self, trial: Trial, why: str, tries: int) -> tuple[Trial, int] | None:
        """Note it; the trial with the number of its next try, where it gets one."""
        last = tries >= TRIES
        self.report(trial, {"why": why, "last": last})
        if not last:
            return trial, tries + 1
        self.failed[trial.name] = why
        return None


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks for a stop: what is given says whether it was pressed. A second one interrupts at once.

    Outside of the main thread, where signals cannot be handled, nothing changes.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def handle(store: Store, trial: Trial, event: Event) -> None:
    """Put on the disk what has to be kept."""
    if event.kind == "checkpoint":
        store.keep_checkpoint(trial.name, event.content)
    elif event.kind == "half":
        store.keep_half(event.content)
    elif event.kind == "result":
        store.keep_result(trial.name, event.content)


@contextmanager
def undisturbed(threads: int) -> Iterator[None]:
    """Inside, torch has so many threads; after, random numbers and threads are as before."""
    before, put_back = torch.get_num_threads(), kept(())
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        put_back()
        torch.set_num_threads(before)


def here(trials: Sequence[Trial], setup: Setup) -> None:
    """In this process."""
    for trial in trials:
        if setup.stop():
            return
        with undisturbed(trial.threads):
            _try_here(trial, setup)


def _try_here(trial: Trial, setup: Setup) -> None:
    again: tuple[Trial, int] | None = trial, 1
    while again is not None:
        try:
            state = setup.store.checkpoint(trial.name)
            for event in train(trial, state, setup.stop, setup.seconds):
                handle(setup.store, trial, event)
                if event.kind in ("point", "result"):
                    setup.report(trial, event.content)
            return
        except InvalidArgumentError:
            raise
        except Exception as error:
            again = setup.failed_try(trial, first_line(error), again[1])


def in_processes(trials: Sequence[Trial], setup: Setup, jobs: int) -> None:
    """In `jobs` processes of this machine. One that dies takes no other trial with it."""
    todo = [(trial, 1) for trial in reversed(trials)]
    workers = {w.connection: w for w in (_Worker(setup) for _ in range(min(jobs, len(todo))))}
    try:
        while workers:
            stopping = setup.stop()
            for worker in workers.values():
                if stopping:
                    worker.ask_to_stop()
                elif worker.trial is None and todo:
                    worker.begin(*todo.pop())
            for idle in [w for w in workers.values() if w.trial is None]:
                workers.pop(idle.connection).end()  # nothing is left to do
            for connection in wait(list(workers), timeout=0.2):
                worker = workers[connection]  # type: ignore[index]
                again = worker.hear(setup)
                if again is not None:
                    todo.append(again)
                if worker.dead:
                    workers.pop(worker.connection).end()
                    if todo:
                        fresh = _Worker(setup)
                        workers[fresh.connection] = fresh
    finally:
        for worker in workers.values():
            worker.process.terminate()


class _Worker:
    """A process that trains what it is told to, seen from the one that tells it."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_work, args=(other, setup.store.folder, setup.seconds), daemon=True
        )
        # The child ignores Ctrl-C, which is for the one that tells it what to do. It inherits that
        # the signal is blocked, so that it cannot come while it starts.
        resource_tracker.ensure_running()  # where it has to start first, it ends with SIGINT unblocked
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        other.close()
        self.trial: Trial | None = None
        self.tries = 0
        self.dead = self._asked = False

    def begin(self, trial: Trial, tries: int) -> None:
        self.trial, self.tries = trial, tries
        with suppress(OSError):  # it died: `hear` notices
            self.connection.send(trial)

    def ask_to_stop(self) -> None:
        if not self._asked:
            self._asked = True
            with suppress(OSError):
                self.connection.send(None)

    def hear(self, setup: Setup) -> tuple[Trial, int] | None:
        """What it says next; the trial, and its next try, where it has to be tried again."""
        trial = self.trial
        assert trial is not None
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self.dead = True
            self.process.join(GRACE)
            kind, content = "failed", f"its process ended with exit code {self.process.exitcode}"
        if kind == "point":
            setup.report(trial, content)
            return None
        if kind == "refused":
            raise InvalidArgumentError(content)
        self.trial = None
        if kind != "failed":  # done, or stopped
            return None
        return setup.failed_try(trial, content, self.tries)

    def end(self) -> None:
        self.connection.close()
        self.process.join(GRACE)
        if self.process.exitcode is None:
            self.process.terminate()


def _work(connection: Connection, folder: Path, seconds: float) -> None:
    """The other side: train what comes, until nothing more can come."""
    store = Store(folder)
    with suppress(EOFError, BrokenPipeError):
        while (trial := connection.recv()) is not None:
            try:
                for event in train(trial, store.checkpoint(trial.name), connection.poll, seconds):
                    handle(store, trial, event)
                    if event.kind in ("point", "result"):
                        connection.send(("point", event.content))
                connection.send(("done", None))
            except (EOFError, BrokenPipeError):
                raise
            except InvalidArgumentError as error:
                connection.send(("refused", str(error)))
            except Exception as error:
                traceback.print_exc()
                connection.send(("failed", first_line(error)))
