"""`gradstats report FILE …`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from gradstats.commands.progress import Progress
from gradstats.commands.running import one_line, print_json

LARGE = 20e6  # bytes of input, from which on it takes some seconds


def register(application: Any) -> None:
    @application.command()
    def report(
        files: Annotated[
            list[Path], Argument(metavar="FILE...", help="Logs, and what commands wrote by --out.")
        ],
        out: Annotated[Path, Option(help="The HTML file to write.")] = Path("report.html"),
        title: Annotated[str | None, Option(help="Default: the files' names.")] = None,
        as_json: Annotated[
            bool, Option("--json", help="One JSON object: the verdict and what was found.")
        ] = False,
    ) -> None:
        """One HTML file from training logs and results: the verdict, figures, warnings and data.

        FILEs are logs of gradstats.Log (JSON lines; several are compared) and results of measure,
        vram, lr-range, sweep, critical, advise and bench. The page needs nothing else: it makes no
        request, and can be opened, sent and printed as it is. Exits with 0 where it was written, 1
        where a package is missing, 2 where a file cannot be used or written.
        """
        with one_line():
            from gradstats.errors import InvalidArgumentError
            from gradstats.workbench import report as reports
            from gradstats.workbench import saved

            if out.resolve() in [file.resolve() for file in files]:
                raise InvalidArgumentError(
                    f"--out {out} is one of the files that are read; name another"
                )
            saved.require_writable(out)
            large = sum(file.stat().st_size for file in files if file.is_file()) > LARGE
            with Progress("report") if large else nullcontext(lambda what, done: None) as progress:
                found = reports.read(files, progress)
                progress("drawing", 1.0)
                made = reports.build(found, title=title)
                page = reports.render(made)
            saved.write_text(out, page)
            if as_json:
                print_json(made.to_dict() | {"out": str(out), "bytes": len(page.encode())})
            else:
                _show(made, out, len(page.encode()))


def _show(made: Any, out: Path, size: int) -> None:
    print(made.verdict.headline)
    print(made.verdict.sure)
    for remark in made.remarks:
        print(f"note: {remark.where}: {remark.text}")
    print(f"Written: {out} ({size / 1e3:,.0f} kB); open it in a browser")
