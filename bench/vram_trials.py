"""Does `gradstats vram` ever recommend a size that then fails? Random small models under random limits.

For each trial: a random MLP, CNN, transformer or LSTM of random widths and a random memory limit; the
recommended size is then trained for five steps in another new process, by a loop of its own that shares no
code with the search, under that limit. A trial fails where that process dies, or its peak resident memory
is above the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from gradstats.errors import GradStatsError
from gradstats.workbench import saved
from gradstats.workbench.vram import largest_micro_batch

SAMPLES, CLASSES, STEPS = 64, 10, 5
KINDS = ("mlp", "cnn", "transformer", "lstm")
BASE = 650e6  # Python, torch and its optimizers, with some room for the model


class Last(nn.Module):
    """A sequence model's classes from its last position."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


def make(seed: int) -> tuple[str, nn.Module, Tensor]:
    """A random model and its inputs."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    if kind == "mlp":
        width, features = draw.randint(50, 2000), draw.randint(500, 20000)
        model = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, CLASSES))
        return kind, model, torch.randn(SAMPLES, features)
    if kind == "cnn":
        width, side = draw.randint(4, 24), draw.randint(24, 56)
        first, second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))
        norm = nn.GroupNorm(1, width)
        model = nn.Sequential(first, norm, nn.ReLU(), second, nn.ReLU(), pool)
        return kind, model, torch.randn(SAMPLES, 3, side, side)
    positions, width = draw.randint(16, 96), 8 * draw.randint(4, 24)
    inputs = torch.randn(SAMPLES, positions, width)
    if kind == "transformer":
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        body: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    else:
        body = nn.LSTM(width, width, batch_first=True)
    return kind, Last(body, width), inputs


def __getattr__(name: str) -> Any:
    """`vram_trials:trial_7` is the factory of the seventh trial."""
    if not name.startswith("trial_"):
        raise AttributeError(name)
    seed = int(name.removeprefix("trial_"))

    def factory() -> tuple[Any, ...]:
        _, model, x = make(seed)
        optimizer = [torch.optim.AdamW, torch.optim.SGD][seed % 2](model.parameters(), 0.01)
        return model, F.cross_entropy, (x, torch.arange(SAMPLES) % CLASSES), optimizer

    return factory


def train(seed: int, size: int, limit: int) -> None:
    """What the second process does: a plain loop, held to the limit; prints its peak."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    model, loss_fn, (x, y), optimizer = __getattr__(f"trial_{seed}")()
    monitor = gradstats.attach(model, optimizer=optimizer)
    for _ in range(STEPS):
        rows = torch.randint(SAMPLES, (size,))
        loss_fn(model(x[rows]), y[rows]).backward()
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def trial(seed: int, max_size: int) -> dict[str, Any]:
    """One trial's figures; `failed` says what went wrong, or is empty."""
    kind, _, _ = make(seed)
    limit = int(BASE * random.Random(seed + 1000).uniform(1.2, 2.5))
    try:
        found = largest_micro_batch(f"vram_trials:trial_{seed}", memory=limit, max_size=max_size)
    except GradStatsError as error:
        return {"seed": seed, "kind": kind, "limit": limit, "failed": str(error)}
    size = found.recommended
    figures = {
        "seed": seed,
        "kind": kind,
        "limit": limit,
        "recommended": size,
        "largest": found.largest,
        "limited_by": found.limited_by,
        "processes": 1 + sum(p.fresh for p in found.points),
        "failed": "",
    }
    if size is None:
        return figures
    command = [sys.executable, __file__, "--train", *map(str, (seed, size, limit))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {**figures, "failed": f"exit {done.returncode}: {done.stderr[-300:]}"}
    peak = int(done.stdout)
    return {**figures, "peak": peak, "failed": "" if peak <= limit else "above the limit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first trial")
    parser.add_argument("--max-size", type=int, default=65536)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--train", type=int, nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(*given.train)
        return
    rows = []
    for seed in range(given.first, given.first + given.trials):
        rows.append(row := trial(seed, given.max_size))
        print({key: value for key, value in row.items() if key != "seed"}, flush=True)
        if given.json:
            given.json.write_text(
                json.dumps({"environment": saved.environment(), "trials": rows}, indent=1)
            )
    failures = sum(bool(row["failed"]) for row in rows)
    print(f"{failures} failures in {len(rows)} trials")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
