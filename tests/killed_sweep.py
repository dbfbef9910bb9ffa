"""A sweep that is killed and goes on: `killed_sweep.py DIRECTORY KILLS`, for test_sweep.py.

One process imports everything once and forks each sweep, the first undisturbed. The second is killed at
random times until it was killed KILLS times, then left to end. What the two found is written to
DIRECTORY/whole.json and DIRECTORY/killed.json, and the number of kills is printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import scipy.special
import torch
import torch._dynamo
import workloads

import gradstats
from gradstats.workbench import saved
from gradstats.workbench.sweep import Settings, parse, sweep

# What a sweep would load when it first needs it: here once, not in each.
_ = scipy.special.stdtrit, torch._dynamo, gradstats.attach, workloads
gradstats.backends.extension()

SETTINGS = Settings(
    "workloads:dropout", parse("16x24,32x12,64x6"), seeds=2, looks=8, precision=0.5, threads=1
)


def start(folder: Path, result: Path) -> int:
    """Sweep in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        try:
            found = sweep(SETTINGS, folder=folder, checkpoint_seconds=0)
            result.write_text(json.dumps(saved.plain(found.to_dict())))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> bool:
    """Whether it went to the end; raises if it failed."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "the sweep failed; see above"
    return True


def main() -> None:
    place, wanted = Path(sys.argv[1]), int(sys.argv[2])
    began = time.perf_counter()
    assert ended(start(place / "whole", place / "whole.json"))
    seconds = time.perf_counter() - began
    draw, kills = random.Random(), 0
    while True:
        child = start(place / "killed", place / "killed.json")
        if kills < wanted:
            time.sleep(draw.uniform(0, 1.5 * seconds / wanted))
            os.kill(child, signal.SIGKILL)
        if ended(child):
            break
        kills += 1
    print(kills)


if __name__ == "__main__":
    main()
