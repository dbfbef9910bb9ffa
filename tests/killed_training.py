"""Training that is killed and resumed: `killed_training.py DIRECTORY KILLS WORKERS`, for test_resume.py.

One process imports everything once and forks each training; a training logs every step and writes a
checkpoint every few. Killed at random times until it was killed KILLS times, then left to end, it must
have done what an undisturbed one did: the same samples, decisions, noise scale and weights in each step.
Writes what it counted to DIRECTORY/result.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import scipy.special
import torch
import torch._dynamo
from torch import nn
from torch.utils.data import Dataset

import gradstats
import gradstats.loader
from gradstats.schedulers import noise_scale

# What a training would load when it first needs it: here once, not in each.
_ = scipy.special.stdtrit, torch._dynamo, gradstats.attach, gradstats.loader
gradstats.backends.extension()

STEPS, EVERY = 80, 3


class Numbered(Dataset):
    """Samples that know their number; noisy targets, so that the noise scale grows in training."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(211, 6, generator=generator)
        self.y = self.x[:, :3] + 0.7 * torch.randn(211, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.x[index], self.y[index]


def train(place: Path, workers: int, ready: Callable[[], object]) -> None:
    """From the checkpoint, if there is one, to step `STEPS`; `ready` is called before the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    monitor = gradstats.attach(model, optimizer=optimizer, half_life=20)
    loader = gradstats.StepLoader(
        Numbered(), micro_batch_size=3, batch_size=12, num_workers=workers, seed=4
    )
    scaling = gradstats.BatchScaling(
        optimizer, batch_size=12, rule="noise", half_life=("momentum",), warm_up=100
    )
    scheduler = gradstats.BatchSizeScheduler(
        noise_scale,
        loader,
        monitor=monitor,
        scaling=scaling,
        every=2,
        cooldown=5,
        max_batch_size=90,
    )
    parts = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "monitor": monitor,
        "loader": loader,
        "scheduler": scheduler,
    }
    done, saved = 0, place / "checkpoint"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        done = state["done"]
    ready()
    with (place / "log").open("a", buffering=1) as log:
        while done < STEPS:
            for step in loader:
                numbers = []
                for (index, x, y), weight in step:
                    numbers += index.tolist()
                    (weight * (model(x) - y).square().sum(1).mean()).backward()
                monitor.step()
                optimizer.step()
                optimizer.zero_grad()
                for _ in range(scheduler.base_steps()):
                    schedule.step()
                scheduler.step()
                done += 1
                weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
                seen = {
                    "step": done,
                    "samples": numbers,
                    "batch_size": scheduler.batch_size,
                    "rates": [rate.hex() for rate in scaling.learning_rates()],
                    "noise": float(monitor.noise_scale().value).hex(),
                    "weights": hashlib.sha256(weights).hexdigest(),
                }
                log.write(json.dumps(seen) + "\n")
                if done % EVERY == 0:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    state |= {"random": torch.get_rng_state(), "done": done}
                    torch.save(state, place / "new")
                    os.replace(place / "new", saved)
                if done == STEPS:
                    break


def start(place: Path, workers: int) -> int:
    """Train in a process of its own, which heads a group; its number, once it is about to step."""
    began, ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            train(place, workers, lambda: os.write(ready, b"."))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(ready)
    os.read(began, 1)
    os.close(began)
    return child


def ended(child: int) -> bool:
    """Whether it went to the end; raises if it failed."""
    status = os.waitpid(child, 0)[1]
    # A worker that starts while its training dies takes who adopts it for its parent, and waits for ever.
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "the training failed; see above"
    return True


def steps(place: Path) -> list[dict]:
    """What was logged: each line is one write, so that a kill comes before or after it."""
    log = place / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    place, wanted, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    whole = place / "whole"
    whole.mkdir()
    child, began = start(whole, workers), time.perf_counter()
    assert ended(child)
    seconds = time.perf_counter() - began
    expected = {seen["step"]: seen for seen in steps(whole)}
    assert sorted(expected) == list(range(1, STEPS + 1))
    draw, kills, again, runs = random.Random(), 0, 0, 0
    while kills < wanted:
        run = place / str(runs)
        run.mkdir()
        runs += 1
        while True:
            child = start(run, workers)
            if kills < wanted:
                time.sleep(draw.uniform(0, seconds / 6))
                os.kill(child, signal.SIGKILL)
            if ended(child):
                break
            kills += 1
        found = steps(run)
        for seen in found:
            assert seen == expected[seen["step"]], (seen, expected[seen["step"]])
        assert {seen["step"] for seen in found} == set(expected)
        again += len(found) - STEPS
    sizes = sorted({seen["batch_size"] for seen in expected.values()})
    result = {"kills": kills, "runs": runs, "steps_done_again": again, "batch_sizes": sizes}
    (place / "result.json").write_text(json.dumps({**result, "seconds": seconds}))


if __name__ == "__main__":
    main()
