"""`gradstats vram module:factory` with real processes held to a limit."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest

from gradstats.errors import GradStatsError
from gradstats.workbench import saved
from gradstats.workbench.vram.process import Told, Trial, try_sizes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")


@pytest.fixture
def run(command_line):
    return partial(command_line, "vram")


def test_what_is_recommended_runs_again_under_the_limit(run, tmp_path, monkeypatch) -> None:
    # Each array has pages of its own, which it gives back: what glibc keeps of those before varies.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    out = tmp_path / "vram.json"
    code, said, err = run("vram_workloads:wide", "--memory", "800MB", "--json", "--out", str(out))
    found = json.loads(said)
    assert (code, saved.read(out, "vram")) == (0, {**saved.read(out, "vram"), **found})
    assert found["device"] == "cpu"
    assert found["budget_bytes"] == 8e8
    assert err.count("confirming a micro-batch of") == sum(p["fresh"] for p in found["points"])
    size = found["recommended"]
    assert size & (size - 1) == 0
    # x, its copy, the output and its gradient: four arrays of 20,000 numbers for each sample.
    assert 3.9 * 80_000 < found["bytes_per_sample"] < 4.2 * 80_000
    assert found["formula"]["model"] == 12 * (2 * 8 * 20000 + 20008)  # weights, gradients, momentum
    again = Told()
    try_sizes(Trial("vram_workloads:wide", 1, int(8e8), 1.0, False, 4, 60), [size], again)
    assert again.points[0].ok
    assert again.points[0].peak_bytes <= 8e8


def test_a_killed_process_is_a_size_that_does_not_fit() -> None:
    told = Told()
    try_sizes(Trial("vram_workloads:killed", 0, int(2e9), 1.0, True, 2, 60), [2, 4, 8], told)
    assert [(p.micro_batch_size, p.ok) for p in told.points] == [(2, True), (4, False)]
    assert told.points[1].why == "the process ended by SIGKILL"


def test_an_error_of_the_code_is_told_as_what_it_is() -> None:
    told = Told()
    words = "vram_workloads:wrong failed at a micro-batch of 4: RuntimeError: mat1 and mat2"
    with pytest.raises(GradStatsError, match=words):
        try_sizes(Trial("vram_workloads:wrong", 0, int(2e9), 1.0, True, 2, 60), [2, 4, 8], told)
    assert [p.ok for p in told.points] == [True]  # what was measured before is kept


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["vram_workloads:wide", "--memory", "10MB"], 1, "the process has taken"),
        (["vram_workloads:absent"], 2, "'absent' in module 'vram_workloads' is not there"),
        ([], 2, "MODULE:FACTORY, or give --formula"),
        (["a:b", "--memory", "lots"], 2, "'lots' is not an amount of memory"),
        (["--formula", "24GB,4GB"], 2, "must be three sizes"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(run, args, code, words) -> None:
    seen, said, err = run(*args)
    assert (seen, said) == (code, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_the_formula_alone(run) -> None:
    said = "(24GB − 4GB)/0.2GB = 100 samples, of which 64\n"
    assert run("--formula", "24GB,4GB,0.2GB") == (0, said, "")
    _, said, _ = run("--formula", "12,3,0.5", "--multiple-of", "8", "--json")
    assert json.loads(said)["chosen"] == 16
