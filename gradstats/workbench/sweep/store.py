"""The folder of a sweep: its settings, each finished trial, and where the others stand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.workbench import saved

__all__ = ["Store"]

SETTINGS, LOCK, HALF, VARIANCE = "settings.json", "lock", "half.pt", "variance.json"


class Store:
    """Files in `folder`, each replaced whole: whatever ends a process leaves files that can be read.

    Two processes that work on one trial write the same bytes, but for seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ---- settings ------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any] | None:
        """Those that the sweep in this folder was begun with; None where there is none."""
        path = self.folder / SETTINGS
        return saved.read(path, "sweep settings")["settings"] if path.exists() else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Go on with these settings.

        Raises InvalidArgumentError where the folder is of a sweep with others. More seeds and more
        plans are no change: trials that are there keep their results.
        """
        new = saved.plain(settings)
        before = self.settings() or new
        changed = [
            f"{name} was {before.get(name)!r} and is {new.get(name)!r}"
            for name in sorted({*before, *new})
            if before.get(name) != new.get(name)
        ]
        if changed:
            raise InvalidArgumentError(
                f"{self.folder} holds a sweep with other settings ({'; '.join(changed)}); go on with "
                "those, or name another --out"
            )
        saved.write(self.folder / SETTINGS, "sweep settings", {"settings": new})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other sweep can work in the folder meanwhile. Raises InvalidArgumentError where one does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("w")
        except OSError as error:
            raise InvalidArgumentError(
                f"{self.folder} cannot be written to ({error.strerror}); name another --out"
            ) from error
        with file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # not a Unix: nobody looks
                pass
            except OSError as error:
                raise InvalidArgumentError(
                    f"another sweep is at work in {self.folder}; wait for it, or name another --out"
                ) from error
            yield

    # ---- trials --------------------------------------------------------------------------------

    def result(self, name: str) -> dict[str, Any] | None:
        """Of a finished trial."""
        path = self.folder / f"{name}.json"
        return saved.read(path, "sweep trial")["trial"] if path.exists() else None

    def keep_result(self, name: str, trial: Mapping[str, Any]) -> None:
        """Write a finished trial's result, and remove its checkpoint."""
        saved.write(self.folder / f"{name}.json", "sweep trial", {"trial": trial})
        with suppress(FileNotFoundError):
            self._checkpoint(name).unlink()

    def checkpoint(self, name: str) -> bytes | None:
        """Where a trial stands."""
        return _read(self._checkpoint(name))

    def keep_checkpoint(self, name: str, data: bytes) -> None:
        _write(self._checkpoint(name), data)

    def _checkpoint(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    # ---- the variance at common weights --------------------------------------------------------

    def half(self) -> bytes | None:
        """The common weights."""
        return _read(self.folder / HALF)

    def keep_half(self, data: bytes) -> None:
        _write(self.folder / HALF, data)

    def variance(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The one measured earlier `about` the same."""
        path = self.folder / VARIANCE
        found = saved.read(path, "sweep variance") if path.exists() else {}
        return found["variance"] if found.get("about") == saved.plain(about) else None

    def keep_variance(self, about: Mapping[str, Any], variance: Mapping[str, Any]) -> None:
        saved.write(
            self.folder / VARIANCE, "sweep variance", {"about": about, "variance": variance}
        )


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InvalidArgumentError(
            f"{path} cannot be written ({error.strerror}); name another --out, or make room"
        ) from error
