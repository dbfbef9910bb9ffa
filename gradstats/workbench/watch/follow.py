"""Reads a file of JSON lines as it grows, whatever happens to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.loggers import About, entry_of

__all__ = ["Follower"]

HEAD = 256  # bytes at the beginning by which a file is known again


class Follower:
    """The rows of a log so far; `read` adds what was written since.

    `rows`: in the order of their steps; `about`: what the log says beside them. A run that went on from a
    checkpoint writes some steps again: the later ones count, and `resumed` how often that was. `spoilt`:
    lines that hold no row. A last line without its end is left until it has one. `restarts`: how often
    the file was emptied or replaced, after which it is read from the beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.about = About()
        self.spoilt = self.restarts = self.resumed = 0
        self.exists = False
        self._changed: float | None = None
        self._position = 0
        self._half = b""
        self._head = b""
        self._identity: tuple[int, int] | None = None

    @property
    def age(self) -> float | None:
        """Seconds since the file was written to; None where it is not there."""
        return None if self._changed is None else max(time.time() - self._changed, 0.0)

    def read(self) -> int:
        """Take in what is new; returns how many rows that was.

        Raises InvalidArgumentError where the file is there and cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                found = self.path.stat()
                self._changed, self.exists = found.st_mtime, True
                head = file.read(HEAD)
                if self._is_another((found.st_dev, found.st_ino), head, found.st_size):
                    self._begin_again()
                self._identity, self._head = (found.st_dev, found.st_ino), head
                file.seek(self._position)
                text = file.read()
                self._position += len(text)
        except FileNotFoundError:
            self.exists, self._changed = False, None
            return 0
        except OSError as error:
            raise InvalidArgumentError(f"{self.path} cannot be read ({error.strerror})") from error
        *lines, self._half = (self._half + text).split(b"\n")
        return sum(self._add(line) for line in lines)

    def _is_another(self, identity: tuple[int, int], head: bytes, size: int) -> bool:
        if self._identity is None:
            return False
        moved = identity != self._identity or size < self._position
        return moved or not head.startswith(self._head)

    def _begin_again(self) -> None:
        self.rows.clear()
        self.about = About()
        self.restarts += 1
        self.spoilt = self.resumed = self._position = 0
        self._half = b""

    def _add(self, line: bytes) -> bool:
        if not line.strip():
            return False
        row = entry_of(line.decode("utf-8", "replace"))
        if row is None:
            self.spoilt += 1
            return False
        if isinstance(row, About):
            self.about = self.about.joined(row)
            return False
        if self.rows and row["step"] <= self.rows[-1]["step"]:
            self.resumed += 1
            while self.rows and self.rows[-1]["step"] >= row["step"]:
                self.rows.pop()
        self.rows.append(row)
        return True
