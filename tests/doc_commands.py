"""The documentation's shell lines, run as in a user's folder, smaller where they would take minutes."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from doc_blocks import ROOT
from threads import num_threads

# Lines that are not run here, as patterns of a whole line, and why.
NOT_RUN = {
    r"make \w+": "sets up an environment of its own and builds: what CI does before these tests",
    r"pip install .+": "changes the environment that the tests run in",
    r"\. \.venv/bin/activate": "of the shell alone; the tests run in such an environment",
    r"python bench/step_overhead\.py .* --peers .+": "times other tools, which the tests do not install",
}

# Added to lines that begin so, the last of which counts: less work of the same kind. Options of the
# line are still read.
SMALLER = {
    "gradstats demo": "--steps 60 --batch-size 8",
    "gradstats measure": "--steps 40",
    "gradstats vram examples": "--max-size 64 --memory 4GB",
    "gradstats sweep": (
        "--plans 16x24,32x12,64x6 --seeds 2 --precision 0.9 --evaluation 64 --looks 4 --target-loss 2"
    ),
    "gradstats critical": "--multipliers 2,4 --warm-up 5 --seeds 2 --samples 256 --evaluations 2",
    "gradstats lr-range": "--steps 6 --loss-samples 128",
    "gradstats bench examples": "--ops group_norm --rounds 1 --quick --threads 1",
    "gradstats bench --compare": "--fail-on 1000",
    "torchrun --nproc-per-node 2 examples/ddp.py": "--epochs 1",
    "torchrun --nproc-per-node 2 examples/fsdp.py": "--steps 10",
    "python bench/step_overhead.py": "--tiny --rounds 1 --turn-seconds 0 --models mlp",
    "python bench/peak_memory.py": "--tiny --models mlp --no-fallback",
    "python bench/growth.py": "--ops layer_norm --cached --rounds 1 --turn-seconds 0 --json growth.json",
    "python bench/conformance.py": "--no-peers --only conv2d packed",
}

# Files that a user has before a line is run, and the lines that write them.
WRITTEN_BY = {
    "runs/demo/steps.jsonl": "gradstats demo --task digits",
    "runs/measure.json": (
        "gradstats measure examples.digits:training --steps 200 --out runs/measure.json "
        "--log runs/measure.jsonl"
    ),
    "runs/measure.jsonl": "gradstats measure examples.digits:training --log runs/measure.jsonl",
    "runs/vram.json": "gradstats vram examples.digits:training --memory 1GB --out runs/vram.json",
    "runs/critical.json": (
        "gradstats critical examples.digits:training --multipliers 2,4,8,16 --warm-up 100 --seeds 8 "
        "--out runs/critical.json"
    ),
    "runs/before.json": "gradstats bench examples.digits:training --no-peers --out runs/before.json",
    "runs/after.json": "gradstats bench examples.digits:training --no-peers --out runs/after.json",
    "run.jsonl": "gradstats measure examples.digits:training --log run.jsonl --no-timing --no-overhead",
}

EXAMPLE = '''"""What the documentation calls my_project.training."""

from examples.digits import training

example = training
'''


@dataclass(frozen=True)
class Ended:
    """How a line ended, and what it printed."""

    code: int
    out: str


def why_not(line: str) -> str | None:
    """The pattern of NOT_RUN that a line is of, None where it is run."""
    return next((pattern for pattern in NOT_RUN if re.fullmatch(pattern, line)), None)


class Shell:
    """A folder of a user's, and what each line said there; a line that comes again is not run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ended: dict[str, Ended] = {}
        for part in ("examples", "bench"):
            (folder / part).symlink_to(ROOT / part)
        (folder / "my_project").mkdir()
        (folder / "my_project" / "training.py").write_text(EXAMPLE, "utf-8")

    def run(self, line: str) -> Ended:
        """Run a line, and before it those that write what it reads."""
        if line not in self._ended:
            words = shlex.split(line)
            for before, word in pairwise(words):
                read = before not in ("--out", "--log")
                if read and word in WRITTEN_BY and not (self.folder / word).exists():
                    assert self.run(WRITTEN_BY[word]).code == 0
            with num_threads(1):  # a line may set another number
                self._ended[line] = _run(words + smaller(line))
        return self._ended[line]


def _run(words: list[str]) -> Ended:
    match words:
        case ["gradstats", *rest] | ["python", "-m", "gradstats", *rest]:
            return _command(rest)
        case ["python", script, *rest]:
            return _script(script, rest)
        case ["torchrun", *rest]:
            return _torchrun(rest)
    pytest.fail(f"{words} is neither run by the tests nor in NOT_RUN")


def smaller(line: str) -> list[str]:
    """What is added to a line."""
    begins = max((b for b in SMALLER if line.startswith(b)), key=len, default=None)
    return [] if begins is None else shlex.split(SMALLER[begins])


def _command(words: list[str]) -> Ended:
    """In this process: importing torch anew takes longer than most commands."""
    from typer.testing import CliRunner

    from gradstats.cli import app

    width = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner(env=width).invoke(app(), words, prog_name="gradstats")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Ended(done.exit_code, done.output)


def _script(script: str, words: list[str]) -> Ended:
    said, argv, path, code = StringIO(), sys.argv, list(sys.path), 0
    sys.argv, sys.path[:] = [script, *words], [str(Path(script).parent), *sys.path]
    try:
        with redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv, sys.path[:] = argv, path
    return Ended(code, said.getvalue())


def _torchrun(words: list[str]) -> Ended:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=240, check=False
    )
    return Ended(done.returncode, done.stdout + done.stderr)
