"""`gradstats vram module:factory`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from gradstats.commands.options import AsJson, Seed
from gradstats.commands.running import (
    INTERRUPTED,
    check_outputs,
    hand_over,
    one_line,
    print_json,
    say_written,
)
from gradstats.errors import InvalidArgumentError


def register(application: Any) -> None:
    @application.command()
    def vram(
        target: Annotated[str | None, Argument(metavar="MODULE:FACTORY")] = None,
        memory: Annotated[
            str | None, Option(help="As 2GB or 1.5GiB. Default: what is available.")
        ] = None,
        margin: Annotated[float, Option(help="Fraction of the memory left free.")] = 0.1,
        multiple_of: Annotated[
            int | None, Option(help="Choose among its multiples. Default: powers of two.")
        ] = None,
        max_size: Annotated[int, Option(help="Largest size tried.")] = 65536,
        plain: Annotated[bool, Option("--plain", help="Without the monitor.")] = False,
        seed: Seed = 0,
        formula: Annotated[
            str | None,
            Option(
                metavar="TOTAL,MODEL,SAMPLE",
                help="The textbook's answer alone, as for 24GB,4GB,0.2GB; nothing is run.",
            ),
        ] = None,
        out: Annotated[Path | None, Option(help="File for the result.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """The largest micro-batch that fits into memory, confirmed by training steps in a new process.

        FACTORY is a function without arguments that returns (model, loss_fn, data), (model, loss_fn,
        data, optimizer) or a gradstats.Workload. On a GPU the memory is that of torch's allocator, on a
        CPU that of the process, which is held to it. Under torchrun all ranks agree on a size.

        Exits with 0 where a size was confirmed, 1 where none fits or the steps fail, 2 where the factory
        or an argument cannot be used, 130 after Ctrl-C, with what was found by then.
        """
        with one_line():
            if formula is not None:
                _textbook(formula, multiple_of, as_json)
                return
            if target is None:
                raise InvalidArgumentError("name what to run as MODULE:FACTORY, or give --formula")
            from gradstats.workbench.vram import parse_bytes

            options = {
                "memory": None if memory is None else parse_bytes(memory),
                "margin": margin,
                "multiple_of": multiple_of,
                "max_size": max_size,
                "plain": plain,
                "seed": seed,
            }
            raise typer.Exit(_run(target, options, out, as_json))


def _run(target: str, options: dict[str, Any], out: Path | None, as_json: bool) -> int:
    check_outputs(out)
    with _ranks() as first:
        return _search(target, options, out, as_json, first)


def _search(
    target: str,
    options: dict[str, Any],
    out: Path | None,
    as_json: bool,
    first: bool,
) -> int:
    from rich.console import Console

    from gradstats.workbench.vram import largest_micro_batch

    progress = Console(stderr=True, highlight=False)

    def report(text: str) -> None:
        if first:
            progress.print(text, markup=False)

    found = largest_micro_batch(target, report=report, **options)
    if first:
        hand_over("vram", target, found, lambda: _show(found), out, as_json)
    if first and not as_json:
        say_written(out)
    if found.limited_by == "interrupted":
        return INTERRUPTED
    return 0 if found.recommended else 1


@contextmanager
def _ranks() -> Iterator[bool]:
    """Under torchrun, joined with the other ranks; gives whether this is the one that speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch

    torch.distributed.init_process_group("gloo")
    try:
        yield int(torch.distributed.get_rank()) == 0
    finally:
        torch.distributed.destroy_process_group()


def _show(found: Any) -> None:
    from gradstats.terminal import console_and_table
    from gradstats.words import beyond_memory
    from gradstats.workbench.vram.sizes import show_bytes

    console, make_table = console_and_table()
    peak = "reserved" if found.device != "cpu" else "peak"
    table = make_table("micro-batch", peak, "seconds a step", "process", "fits")
    for point in found.points:
        table.add_row(
            f"{point.micro_batch_size:,}",
            "" if point.peak_bytes is None else show_bytes(point.peak_bytes),
            "" if point.seconds is None else f"{point.seconds:.3g}",
            "fresh" if point.fresh else "shared",
            "yes" if point.ok else "no",
            style=None if point.ok else "red",
        )
    console.print(table)
    for size, why in {p.micro_batch_size: p.why for p in found.points if not p.ok}.items():
        console.print(f"{size:,} does not fit: {why}", markup=False, soft_wrap=True)
    open_ended = None if found.beyond is None else beyond_memory(found.beyond)
    if found.bytes_per_sample is not None:
        console.print(
            f"{show_bytes(found.fixed_bytes)} and {show_bytes(found.bytes_per_sample)} a sample: "
            + (open_ended or f"{found.largest:,} would just fill {show_bytes(found.budget_bytes)}"),
            soft_wrap=True,
        )
    if found.formula is not None:
        console.print(
            f"Textbook (total − model)/(per sample): ({show_bytes(found.formula.total)} − "
            f"{show_bytes(found.formula.model)})/{show_bytes(found.formula.per_sample)} = "
            + (open_ended or f"{found.formula.largest:,}, of which {found.formula.chosen:,}"),
            soft_wrap=True,
        )
    for remark in found.remarks:
        console.print(f"Note: {remark}", markup=False, soft_wrap=True)
    console.print(str(found), style="bold", soft_wrap=True)


def _textbook(text: str, multiple_of: int | None, as_json: bool) -> None:
    from gradstats.workbench.vram import formula, parse_bytes

    parts = text.split(",")
    if len(parts) != 3:
        raise InvalidArgumentError(
            f"--formula {text} must be three sizes, total,model,per_sample, as in 24GB,4GB,0.2GB"
        )
    found = formula(*map(parse_bytes, parts), multiple_of=multiple_of)
    if as_json:
        print_json(found.to_dict())
        return
    total, model, sample = (part.strip() for part in parts)
    print(f"({total} − {model})/{sample} = {found.largest:,} samples, of which {found.chosen:,}")
