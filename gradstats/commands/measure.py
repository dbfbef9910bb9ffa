"""`gradstats measure module:factory`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from gradstats.commands.options import AsJson, Out, Seed, Target
from gradstats.commands.running import INTERRUPTED, check_outputs, hand_over, one_line, say_written

LAYERS = 8  # rows of the table
NAMED = 4  # parameters that are named in a line


def register(application: Any) -> None:
    @application.command()
    def measure(
        target: Target,
        batch_size: Annotated[
            int | None, Option(help="Samples per optimizer step. Default: the workload's, else 32.")
        ] = None,
        micro_batch_size: Annotated[
            int | None, Option(help="Samples at once, a divisor of the batch size.")
        ] = None,
        steps: Annotated[int, Option(help="Optimizer steps, at most.")] = 100,
        precision: Annotated[
            float | None,
            Option(help="End once the interval's ends differ by this factor: 1.5, say."),
        ] = None,
        frozen: Annotated[bool, Option("--frozen", help="No updates of the weights.")] = False,
        method: Annotated[
            str, Option(help="per_sample (exact), norm_layers or micro_batch.")
        ] = "per_sample",
        sample: Annotated[str, Option(help="What is counted: example or token.")] = "example",
        every: Annotated[int, Option(help="Measure one step out of so many.")] = 1,
        geometry: Annotated[
            list[str] | None,
            Option(help="Also as the optimizer sees it: adam or sign; may be repeated."),
        ] = None,
        seed: Seed = 0,
        overhead: Annotated[bool, Option(help="Time plain against measured steps.")] = True,
        timing: Annotated[
            bool, Option(help="Time several batch sizes, so that the advice weighs time.")
        ] = True,
        log: Annotated[
            Path | None,
            Option(help="Write the rows here as it goes (JSON lines; `gradstats watch`)."),
        ] = None,
        out: Out = None,
        as_json: AsJson = False,
    ) -> None:
        """The noise scale of your training, its layers, what measuring costs, and the batch size to use.

        FACTORY is a function without arguments that returns (model, loss_fn, data), (model, loss_fn,
        data, optimizer) or a gradstats.Workload. Real steps are taken, after which the weights, the
        optimizer and the random numbers are as before. Ctrl-C keeps what was measured. Exits with 0
        where there is a noise scale, 1 where none could be had or the model cannot be measured like
        this, 2 where the factory or an argument cannot be used, 130 after Ctrl-C.
        """
        with one_line():
            from gradstats.commands.progress import Progress
            from gradstats.loggers import JsonLines
            from gradstats.workbench import measure as bench
            from gradstats.workbench.workload import load

            check_outputs(out)
            workload = load(target, seed=seed)
            sinks = [] if log is None else [JsonLines(log)]
            with Progress("measure") as progress:

                def report(reached: bench.Progress) -> None:
                    text = reached.stage if reached.row is None else _reading(reached.row)
                    progress(text, reached.step / reached.steps)

                found = bench.measure(
                    workload,
                    batch_size=batch_size,
                    micro_batch_size=micro_batch_size,
                    steps=steps,
                    precision=precision,
                    frozen=frozen,
                    method=method,
                    sample=sample,
                    every=every,
                    geometry=tuple(geometry or ()),
                    seed=seed,
                    overhead=overhead,
                    timing=timing,
                    sinks=sinks,
                    report=report,
                )
            hand_over("measure", target, found, lambda: _show(found), out, as_json)
            if not as_json:
                kept = [sink.path for sink in sinks if sink.error is None]
                say_written(*kept, out)
            if found.stopped == "interrupted":
                raise typer.Exit(INTERRUPTED)
            raise typer.Exit(0 if found.noise.num_steps else 1)


def _reading(row: Any) -> str:
    from gradstats.terminal import between

    ends = between(row["noise_scale_low"], row["noise_scale_high"])
    return f"step {row['step']:,}  loss {row['loss']:.4g}  noise scale {row['noise_scale']:.3g} ({ends})"


def _show(found: Any) -> None:
    """For people: what was measured, where the noise is, the cost, the advice."""
    from gradstats.estimators import readable
    from gradstats.terminal import advice_table, between, console_and_table

    console, make_table = console_and_table()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    settings, unit = found.settings, "tokens" if found.settings.sample == "token" else "samples"
    if found.stopped == "interrupted":
        say("Interrupted: what follows was measured until then.")
    kind = "at the weights as they are" if settings.frozen else "of training, then undone"
    say(f"{found.steps:,} steps of {settings.batch_size:,} samples {kind}, on {settings.device}")
    say(str(found.noise))
    for noise in found.geometries.values():
        say(str(noise))
    if found.layers:
        title = f"Where the noise is ({len(found.layers)} parameters)"
        table = make_table(
            "parameter", "share of tr Σ", f"its noise scale ({unit})", "interval",
            title=title, title_justify="left",
        )  # fmt: skip
        for layer in found.layers[:LAYERS]:
            share = "" if layer.share is None else f"{layer.share:.1%}"
            ends = between(layer.noise.low, layer.noise.high)
            table.add_row(layer.name, share, readable(layer.noise.value), ends)
        console.print(table)
    for text in coverage_lines(found):
        say(text)
    if found.overhead is not None:
        cost = found.overhead
        say(
            f"a step takes {cost.plain * 1e3:.3g} ms, measured {cost.measured * 1e3:.3g} ms (medians); "
            f"neighbours differ by {cost.ratio:.2f} × ({cost.low:.2f} to {cost.high:.2f})"
        )
    if found.timing is not None:
        say(str(found.timing))
    for note in found.notes:
        say(f"note: {note}")
    if found.advice is not None:
        console.print(advice_table(found.advice.to_dict(), settings.learning_rate))


def coverage_lines(found: Any) -> list[str]:
    """What the noise scale speaks for, and what not and why."""
    lines = [f"measured: {100 * found.coverage:.4g}% of the trainable parameters"]
    reasons: dict[str, list[str]] = {}
    for name, why in found.missing.items():
        reasons.setdefault(why, []).append(name)
    lines += [f"not measured: {_named(names)}: {why}" for why, names in reasons.items()]
    slow: dict[str, list[str]] = {}
    for name, (size, why) in found.fallbacks.items():
        slow.setdefault(f"{why} ({size / 1e6:.3g} MB)", []).append(name)
    lines += [f"sample by sample: {_named(names)}: {why}" for why, names in slow.items()]
    return lines


def _named(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
