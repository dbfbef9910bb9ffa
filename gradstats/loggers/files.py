"""Rows in files: JSON lines and CSV."""

from __future__ import annotations

import csv
import json
import math
import shutil
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.loggers.about import About
from gradstats.loggers.log import Row

__all__ = ["CsvFile", "JsonLines"]


class _File:
    """A file that rows are added to. A row that the disk has no room for stops nothing but the file."""

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.error: str | None = None  # why rows are lost since some step
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = self.path.open(
                "a" if resume else "w", encoding="utf-8", newline=""
            )
            if resume:
                self._end_line()
        except OSError as error:
            raise InvalidArgumentError(
                f"{self.path} cannot be written ({error.strerror}); name another file"
            ) from error

    def _end_line(self) -> None:
        """What a killed run left half-written becomes a line of its own, which readers pass over."""
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            self._file.write("\n")

    def __call__(self, row: Row, step: int) -> None:
        self._keep(step, lambda: self._write(row, step))

    def _keep(self, step: int, write: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            write()
            self._file.flush()
        except OSError as error:
            self.error = f"{self.path} takes no more rows since step {step} ({error.strerror})"
            warnings.warn(f"{self.error}; the training goes on", stacklevel=4)

    def _write(self, row: Row, step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or f"{self.path} could not be closed ({error.strerror})"


class JsonLines(_File):
    """One JSON object per row; numbers that are not finite are null. `resume` adds to what is there.

    What `Log` knows beside its rows stands in lines of its own, ``{"about": …}``; `read_log` reads both.
    """

    def _write(self, row: Row, step: int) -> None:
        self._line({k: v if math.isfinite(v) else None for k, v in row.items()})

    def about(self, about: About, step: int) -> None:
        """A line of what the rows do not hold; of several, the later counts."""
        self._keep(step, lambda: self._line({"about": about.to_dict()}))

    def _line(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")


class CsvFile(_File):
    """Comma-separated values, a column for each number. `resume` adds to what is there.

    Where a row brings a new number, the file is written anew with its column added, which is empty in
    the rows before; it takes the place of the old one once it is whole. Raises GradStatsError where the
    path is no regular file, so that this cannot be done.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        super().__init__(path, resume=resume)
        self._columns: list[str] = []
        if resume and self.path.stat().st_size:
            with self._read() as file:
                self._columns = next(csv.reader(file), [])

    def _read(self) -> TextIO:
        return self.path.open(encoding="utf-8", errors="replace", newline="")

    def _write(self, row: Row, step: int) -> None:
        new = [name for name in row if name not in self._columns]
        if new and self._columns:
            self._widen(new, step)
        elif new:
            self._columns = new
            csv.writer(self._file).writerow(new)
        csv.writer(self._file).writerow([row.get(name, "") for name in self._columns])

    def _widen(self, new: list[str], step: int) -> None:
        """The same rows in a file with more columns."""
        if not self.path.is_file():
            raise GradStatsError(
                f"step {step} has {', '.join(new)}, which the first row of {self.path} had not, and what "
                "is no regular file cannot be written anew. Pass the same numbers in every step, or use "
                "JsonLines"
            )
        columns = [*self._columns, *new]
        path = self.path.resolve()
        whole = path.with_name(f"{path.name}.new")
        try:
            with self._read() as rows, whole.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                for row in islice(csv.reader(rows), 1, None):
                    writer.writerow(row + [""] * (len(columns) - len(row)))
            shutil.copymode(path, whole)
            self._file.close()
            whole.replace(path)
        except BaseException:
            whole.unlink(missing_ok=True)
            raise
        self._file, self._columns = path.open("a", encoding="utf-8", newline=""), columns
