"""The command line: `gradstats doctor`, `gradstats check` and `gradstats demo`.

Exit codes: 0 all is well; 1 it cannot work here (a package is missing, or a backend asked for by
name cannot run), or `check` found something wrong or not measured; 2 an argument cannot be used;
130 interrupted by Ctrl-C.
"""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

from gradstats.errors import GradStatsError, InvalidArgumentError


def app() -> Any:
    """The typer application. Raises ImportError where typer is not installed."""
    import typer

    application = typer.Typer(
        help="Exact per-sample gradient statistics and the gradient noise scale.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @application.command()
    def doctor(
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    ) -> None:
        """Which backends can run here, which are used and why, and how to get those missing.

        Exits with 1 where the backend named by GRADSTATS_BACKEND cannot run.
        """
        with _one_line():
            from gradstats import doctor as doctor_module

            raise typer.Exit(doctor_module.doctor(as_json=as_json))

    @application.command()
    def check(
        target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY")],
        samples: Annotated[int, typer.Option(help="Compared one at a time, about.")] = 3,
        batch_dim: Annotated[Optional[int], typer.Option(help="Default: found out.")] = None,  # noqa: UP045
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    ) -> None:
        """Whether the statistics are exact on your model, compared with plain autograd.

        FACTORY is a function without arguments that returns (model, loss_fn, batch). Exits with 0
        where everything is exact, 1 where something is wrong or not measured, 2 where the factory
        or an argument cannot be used.
        """
        with _one_line():
            from gradstats.check_command import run

            raise typer.Exit(run(target, samples=samples, batch_dim=batch_dim, as_json=as_json))

    @application.command()
    def demo(
        task: Annotated[str, typer.Option(help="text or digits.")] = "text",
        steps: Annotated[Optional[int], typer.Option(help="Optimizer steps.")] = None,  # noqa: UP045
        batch_size: Annotated[Optional[int], typer.Option(help="Samples per step.")] = None,  # noqa: UP045
        out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/demo"),
        seed: Annotated[int, typer.Option(help="Of the model and its data.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    ) -> None:
        """Train a small network for about a minute and recommend its batch size.

        Writes steps.jsonl, summary.json and noise_scale.png. Ctrl-C keeps what was measured.
        """
        with _one_line():
            from gradstats.demo.command import demo as run

            code = run(
                task, steps=steps, batch_size=batch_size, out=out, seed=seed, as_json=as_json
            )
            raise typer.Exit(code)

    return application


def main() -> None:
    """Entry point of the `gradstats` script and of `python -m gradstats`."""
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


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors made on purpose end in one line and an exit code, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except GradStatsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidArgumentError) else 1)
