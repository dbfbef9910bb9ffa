"""What the commands have in common: how they end, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
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


def say_written(*files: Path | None) -> None:
    """Name the files that were written, where there are any."""
    if names := [str(path) for path in files if path is not None]:
        print("Written: " + ", ".join(names))
