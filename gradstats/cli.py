"""The command line: `gradstats doctor`, `gradstats check`, `gradstats demo` and more.

Exit codes: 0 all is well; 1 it cannot work here (a package is missing, or a backend asked for by
name cannot run), or a command found something wrong; 2 an argument cannot be used; 130 interrupted
by Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from gradstats.commands import COMMANDS


def app() -> Any:
    """The typer application. Raises ImportError where typer is not installed."""
    import typer

    application = typer.Typer(
        help="Exact per-sample gradient statistics and the gradient noise scale.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # fills the lines of the docstrings anew
    )
    for name in COMMANDS:
        importlib.import_module(f"gradstats.commands.{name}").register(application)
    return application


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A line: gradstats' own without the place in its code, which says nothing to a user."""
    own = Path(filename).is_relative_to(Path(__file__).parent)
    return (
        f"warning: {message}\n" if own else f"{filename}:{lineno}: {category.__name__}: {message}\n"
    )


def main() -> None:
    """Entry point of the `gradstats` script and of `python -m gradstats`."""
    # Memory on CPUs is read by torch's profiler, which otherwise announces itself on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # A terminal without Σ gets a question mark, no traceback.
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    warnings.formatwarning = _warning
    try:
        application = app()
    except ImportError as error:
        print(
            f"error: the command line needs typer and rich ({error}); "
            "run `pip install 'gradstats[cli]'`",
            file=sys.stderr,
        )
        sys.exit(1)
    application(prog_name="gradstats")
