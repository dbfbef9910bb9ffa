"""What joining the ranks costs from 8 to 16,384 GPUs: formulas, no measurement. Writes docs/many_machines.md.

python bench/many_machines.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import checkout

from gradstats.collective_cost import (
    Network,
    all_gather_bytes,
    all_gather_seconds,
    all_reduce_seconds,
    fastest,
    moments_bytes,
    statistics_bytes,
)

RANKS = (8, 64, 256, 1024, 4096, 16384)
NODE = 8  # GPUs that share the fast links
INSIDE, BETWEEN = Network(450e9, 3e-6), Network(50e9, 5e-6)
FLOPS, USED = (
    989e12,
    0.4,
)  # of an H100 in bf16 without sparsity, and the share that training reaches


@dataclass(frozen=True)
class Model:
    name: str
    tensors: int  # parameter tensors
    elements: float
    tokens: int  # of each rank in a step

    @property
    def seconds(self) -> float:
        """Computing of a step: 6 FLOP for each parameter and token."""
        return 6 * self.elements * self.tokens / (FLOPS * USED)


MODELS = (
    Model("GPT-2, 124M", 148, 124.4e6, 16 * 1024),
    Model("Llama 3 8B", 291, 8.03e9, 8192),
    Model("Llama 3 70B", 723, 70.6e9, 8192),
)

HEAD = """\
# Many machines

What `monitor.step()` sends between ranks, and what share of a training step that is. **Computed from
formulas (`gradstats.collective_cost`), not measured**; the page is written by `bench/many_machines.py`.

Nominal, and to be replaced by your own: a rank sends {between:.0f} GB/s at {latency:.0f} µs per
message, within a node of {node} GPUs {inside:.0f} GB/s at {near:.0f} µs; an H100 computes
{flops:.0f} TFLOP/s in bf16, of which training reaches {used:.0%}; a step is 6 FLOP per parameter and
token, and everything else in it is hidden behind that. The
collective is hidden behind nothing. Ring and tree are the two shapes of `gradstats.collective_cost`;
which one is taken is up to the communication library, its version and the layout of the nodes.

## The statistics

One all-gather of `24·P + 16` bytes per rank for P parameter tensors, whatever their size. Every rank
receives the parts of all others and adds them in the same order, so that all have the same bits.
"""

TABLE = """
**{name}**: {tensors} tensors, {tokens:,} tokens per GPU, {step:,.0f} ms of computing per step;
{part:,} bytes per rank

| GPUs | received per rank | ring, ms | of a step | tree, ms | of a step |
|---|---|---|---|---|---|
"""

MIDDLE = """
What a rank receives grows with the number of ranks, and so does a ring's latency: in short steps on
thousands of GPUs the gather is no longer free. `attach(every=k)` divides all of it by k. Summing on the
way (an all-reduce of the same `24·P + 16` bytes) would take {reduce:.2f} ms on 16,384 GPUs for the largest
of these models, at the price of sums whose order, and last bits, depend on the network.

## Second moments

`moments=True` adds one all-reduce of 4 bytes per parameter element, twice the traffic of bf16 gradients:

| model | GB per rank | {heads} |
|---|---|{rule}|
"""

END = """
Milliseconds, and share of a step, in the faster shape. That is for a model which every rank holds: with
FSDP2 the gradients are gathered besides, and a whole weight-sized sum is kept on every rank.

## Decisions

A scheduler's decision is two broadcasts of a pickled pair of numbers every `every` steps: some 240
bytes to each other rank with gloo, headers included, whatever the model.

## Bytes really sent

`tests/rank_cases_bytes.py` counts what each rank's sockets sent during `monitor.step()` (gloo, TCP, float64,
120 parameter tensors of 16,320 elements in all) and holds it against the formulas, `24·P + 16` to each of
the others and `2·(W − 1)/W` of the moments:

| ranks | | formula | sent |
|---|---|---|---|
| 2 | statistics | 2,896 | 3,184 |
| 2 | and moments | 133,456 | 134,320 |
| 4 | statistics | 8,688 | 9,552 |
| 4 | and moments | 204,528 | 207,120 |

The rest is gloo's headers, 48 bytes for each message.
"""


def network(ranks: int) -> Network:
    return INSIDE if ranks <= NODE else BETWEEN


def size(number: float) -> str:
    """Bytes for people: three digits."""
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= each:
            return f"{number / each:.3g} {unit}"
    return f"{number:.0f} B"


def share(seconds: float, step: float) -> str:
    return f"{100 * seconds / step:.2g}%" if seconds < step else f"{seconds / step:.1f} ×"


def page() -> str:
    parts = [
        HEAD.format(
            between=BETWEEN.bytes_per_second / 1e9, latency=BETWEEN.latency * 1e6, node=NODE,
            inside=INSIDE.bytes_per_second / 1e9, near=INSIDE.latency * 1e6, flops=FLOPS / 1e12,
            used=USED,
        )
    ]  # fmt: skip
    for model in MODELS:
        part = statistics_bytes(model.tensors)
        parts.append(
            TABLE.format(
                name=model.name, tensors=model.tensors, tokens=model.tokens,
                step=model.seconds * 1e3, part=part,
            )
        )  # fmt: skip
        for ranks in RANKS:
            cells = [f"{ranks:,}", size(all_gather_bytes(part, ranks))]
            for shape in ("ring", "tree"):
                seconds = all_gather_seconds(part, ranks, network(ranks), shape)
                cells += [f"{seconds * 1e3:.2g}", share(seconds, model.seconds)]
            parts.append(f"| {' | '.join(cells)} |\n")
    largest = statistics_bytes(MODELS[-1].tensors)
    reduce = 1e3 * fastest(all_reduce_seconds, largest, RANKS[-1], BETWEEN)
    heads, rule = " | ".join(f"{ranks:,}" for ranks in RANKS), "|".join("---" for _ in RANKS)
    parts.append(MIDDLE.format(reduce=reduce, heads=heads, rule=rule))
    for model in MODELS:
        added = moments_bytes(round(model.elements))
        cells = [model.name, f"{added / 1e9:.3g}"]
        for ranks in RANKS:
            seconds = fastest(all_reduce_seconds, added, ranks, network(ranks))
            cells.append(f"{seconds * 1e3:,.0f}, {share(seconds, model.seconds)}")
        parts.append(f"| {' | '.join(cells)} |\n")
    return "".join([*parts, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=checkout.ROOT / "docs" / "many_machines.md")
    parser.parse_args().out.write_text(page())


if __name__ == "__main__":
    main()
