"""`gradstats bench`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from gradstats.commands.options import AsJson
from gradstats.commands.running import INTERRUPTED, check_outputs, one_line, print_json, say_written
from gradstats.errors import GradStatsError


def register(application: Any) -> None:
    @application.command()
    def bench(
        target: Annotated[
            str | None,
            Argument(metavar="[MODULE:FACTORY]", help="A training whose step is timed too."),
        ] = None,
        ops: Annotated[str, Option(help="Operations, separated by commas; all or none.")] = "all",
        steps: Annotated[bool, Option(help="Time whole steps of the standard models.")] = True,
        models: Annotated[
            str, Option(help="Of mlp, cnn, gpt, resnet, vit, shared, separated by commas.")
        ] = "mlp,cnn,gpt",
        peers: Annotated[bool, Option(help="Time the other tools that are installed.")] = True,
        batch_size: Annotated[
            int | None, Option(help="Of MODULE:FACTORY. Default: the workload's.")
        ] = None,
        threads: Annotated[
            str, Option(help="Numbers of threads, separated by commas. Default: torch's.")
        ] = "",
        rounds: Annotated[int, Option(help="Turns of each variant.")] = 15,
        quick: Annotated[
            bool, Option(help="Small shapes, few rounds: what runs, and no figures to trust.")
        ] = False,
        out: Annotated[Path | None, Option(help="JSON file as pytest-benchmark writes it.")] = None,
        compare: Annotated[
            tuple[Path, Path] | None,
            Option(metavar="OLD NEW", help="Compare two such files instead of timing."),
        ] = None,
        fail_on: Annotated[
            float, Option(help="With --compare: exit with 1 where slower by this factor.")
        ] = 1.1,
        as_json: AsJson = False,
    ) -> None:
        """Time operations and whole steps on this machine, beside torch's kernels and other tools.

        Operations are checked against float64 first, timed in turns with the torch kernels that they
        replace, and set beside this machine's memory bandwidth and matrix throughput, measured in the same
        run. Steps are timed in turns with the plain step. MODULE:FACTORY, as of `gradstats critical`, is a
        training of yours to time the step of; the standard models are then left out unless --models
        names them.

        Exits with 0; 1 where an operation is wrong or, with --compare, something became slower beyond its
        noise by --fail-on; 2 where an argument cannot be used; 130 on Ctrl-C (--out keeps what was timed).
        """
        with one_line():
            if compare is not None:
                raise typer.Exit(_compare(*compare, fail_on, as_json))
            from gradstats.commands.progress import Progress
            from gradstats.workbench.bench.files import write
            from gradstats.workbench.bench.peers import PEERS
            from gradstats.workbench.bench.suite import Suite
            from gradstats.workbench.bench.suite import bench as run
            from gradstats.workbench.workload import load

            check_outputs(out)
            workload = None if target is None else load(target)
            if workload is not None and batch_size is not None:
                workload.batch_size = batch_size
            chosen = names(models) if steps else []
            if target is not None and models == DEFAULT_MODELS:
                chosen = []
            kept: list[Suite] = []

            def keep(suite: Suite) -> None:
                kept[:] = [suite]
                if out is not None:
                    write(out, suite.timed, {"target": target, **suite.to_dict()})

            try:
                with Progress("bench") as progress:
                    found = run(
                        operations=None if ops == "all" else names(ops),
                        models=chosen,
                        workload=workload,
                        name=target or "",
                        peers=tuple(PEERS) if peers else (),
                        threads=[number(n) for n in names(threads)],
                        rounds=rounds,
                        quick=quick,
                        progress=progress,
                        keep=keep,
                    )
            except KeyboardInterrupt:
                where = "" if out is None or not kept else f"; what was timed is in {out}"
                typer.echo(f"interrupted{where}", err=True)
                raise typer.Exit(INTERRUPTED) from None
            except GradStatsError:  # a full disk among them: what was timed is shown
                for suite in kept:
                    _tell(suite, target, as_json)
                raise
            _tell(found, target, as_json)
            if not as_json:
                say_written(out)


def _tell(found: Any, target: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"target": target, **found.to_dict()})
    else:
        _show(found)


DEFAULT_MODELS = "mlp,cnn,gpt"


def names(text: str) -> list[str]:
    """From "a,b"; none from "none" and ""."""
    return [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]


def number(text: str) -> int:
    from gradstats.errors import InvalidArgumentError

    if not text.isdecimal():
        raise InvalidArgumentError(f"{text!r} is not a whole number, as --threads 1,2 needs them")
    return int(text)


def _compare(old: Path, new: Path, fail_on: float, as_json: bool) -> int:
    from gradstats.errors import InvalidArgumentError
    from gradstats.workbench.bench.compared import compare_files

    if not fail_on >= 1:
        raise InvalidArgumentError(
            f"--fail-on {fail_on} cannot be used; pass a factor of 1 or more"
        )
    found = compare_files(old, new)
    worse = found.slower(fail_on)
    if as_json:
        print_json({**found.to_dict(), "fail_on": fail_on, "failed": [c.name for c in worse]})
        return 1 if worse else 0
    from gradstats.terminal import console_and_table

    console, make_table = console_and_table()
    table = make_table("benchmark", "old", "new", "new / old, 99%", "")
    table.columns[0].overflow = "fold"  # names are what two files are compared by
    table.columns[3].no_wrap = True
    for change in found.changes:
        table.add_row(
            change.name.replace(", threads ", ", "),
            _measured(change, change.old),
            _measured(change, change.new),
            f"{change.ratio:.2f} ({_end(change.low)}–{_end(change.high)})",
            "" if change.verdict == "same" else change.verdict,
            style={"slower": "red", "faster": "green"}.get(change.verdict),
        )
    console.print(table)
    for what, only in (("old", found.only_old), ("new", found.only_new)):
        if only:
            console.print(f"Only in the {what} file: {', '.join(only)}", soft_wrap=True)
    console.print(
        f"{len(worse)} of {len(found.changes)} slower beyond their noise and by {fail_on:g} or more."
    )
    return 1 if worse else 0


def _end(ratio: float) -> str:
    """Of an interval, which few rounds that scatter make very wide."""
    return f"{ratio:.2f}" if 0.01 <= ratio < 100 else f"{ratio:.0e}"


def _measured(change: Any, value: float) -> str:
    """A time, or how many times that of the reference it is."""
    if change.of == "seconds":
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} × {change.of.removeprefix('ratio to ')}"


def _show(found: Any) -> None:
    from gradstats.terminal import console_and_table

    console, make_table = console_and_table()
    for ceilings in found.ceilings:
        console.print(
            f"{_threads(ceilings.threads)}: memory {ceilings.bytes_per_second / 1e9:.1f} GB/s (copy "
            f"{ceilings.copy / 1e9:.1f}, triad {ceilings.triad / 1e9:.1f}, arrays of "
            f"{ceilings.array_bytes / 2**20:.0f} MiB), matrix products "
            f"{ceilings.flops_per_second / 1e9:.1f} GFLOP/s ({ceilings.matrix_size:,} square)",
            soft_wrap=True,
        )
    for threads in [ceilings.threads for ceilings in found.ceilings]:
        if rows := [row for row in found.rows("ops") if row["threads"] == threads]:
            title = f"Operations, {_threads(threads)}, against torch's own kernels"
            table = make_table("", "by", "ms", "of torch's", "of ceiling", title=title)
            for row in rows:
                own = row["variant"] != "torch"
                table.add_row(
                    f"  {row['variant']}" if own else f"{row['op']} {row['shape']}",
                    row["backend"],
                    f"{row['seconds'] * 1e3:.3f}",
                    _ratio(row) if own else "",
                    f"{row['of_ceiling']:.0%} {row['limit']}",
                )
            console.print(table)
        if rows := [row for row in found.rows("steps") if row["threads"] == threads]:
            title = f"Whole steps, {_threads(threads)}"
            table = make_table("", "ms", "of plain", "remark", title=title)
            table.columns[0].no_wrap = True
            for row in rows:
                plain = row["variant"] == "plain"
                remark = [row["status"]] if row["status"] != "ok" else []
                table.add_row(
                    f"{row['model']} plain" if plain else f"  {row['variant']}",
                    "" if row["seconds"] is None else f"{row['seconds'] * 1e3:.2f}",
                    "" if plain or row["seconds"] is None else _ratio(row),
                    ": ".join(remark + [row["note"]] * bool(row["note"])),
                )
            console.print(table)
    if found.rows("ops"):
        console.print(
            "of ceiling: the least time that the gradients' own work could take at these rates, over the "
            "time taken; above 100% where the data stay in the caches."
        )


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def _ratio(row: Any) -> str:
    """Median and quartiles."""
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"
