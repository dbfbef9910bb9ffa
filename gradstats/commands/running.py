"""What the commands have in common: how they end, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradstats.errors import GradStatsError, InvalidArgumentError

INTERRUPTED = 130


@contextmanager
def one_line() -> Iterator[None]:
    """Errors made on purpose end in one line and an exit code, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except GradStatsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidArgumentError) else 1)


def print_json(value: Any) -> None:
    """One JSON object on standard output; numbers that JSON does not have become null."""
    from gradstats.workbench.saved import plain

    print(json.dumps(plain(value), allow_nan=False), flush=True)


def check_outputs(out: Path | None, picture: Path | None = None) -> None:
    """Raise where a result or its picture could not be written: to be told before long work."""
    from gradstats.workbench import pictures, saved

    if picture is not None:
        pictures.require_drawable(picture)
    for path in (out, picture):
        if path is not None:
            saved.require_writable(path)


def hand_over(
    kind: str, target: str | None, found: Any, show: Callable[[], object], out: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Print a result, as JSON or by `show`, then write it: where the disk is full, it has been shown."""
    from gradstats.workbench import saved

    content = {"target": target, "environment": saved.environment(), **found.to_dict()}
    if as_json:
        print_json(content)
    else:
        show()
    if out is not None:
        saved.write(out, kind, content)


def say_written(*files: Path | None) -> None:
    """Name the files that were written, where there are any."""
    if names := [str(path) for path in files if path is not None]:
        print("Written: " + ", ".join(names))
