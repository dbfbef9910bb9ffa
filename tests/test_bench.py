"""The benchmark scripts run, on models too small to say anything about time."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def _run(script: str, *args: str) -> str:
    command = [sys.executable, str(BENCH / script), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_step_overhead(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    args = ["--tiny", "--rounds", "2", "--turn-seconds", "0", "--models", "mlp"]
    text = _run("step_overhead.py", *args, "--json", str(out))
    rows = json.loads(out.read_text())["models"]["mlp"]
    assert rows["plain"]["ratio"]["median"] == 1.0
    for kind in ("norms", "norms+moments"):
        assert rows[f"gradstats {kind}"]["status"] == "ok"
        assert f"gradstats {kind}" in text
    assert all(row["status"] in ("ok", "refused") for row in rows.values()), rows


def test_growth(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    args = ["--ops", "layer_norm", "--cached", "--rounds", "1", "--turn-seconds", "0"]
    _run("growth.py", *args, "--json", str(out))
    curves = json.loads(out.read_text())["curves"]
    assert {(c["kind"], c["axis"]) for c in curves} == {
        (kind, axis) for kind in ("torch", "norms", "norms+moments") for axis in "BT"
    }
    for curve in curves:
        assert len(curve["points"]) == len(curve["relative"])
        assert min(curve["relative"]) > 0


def test_time_to_target(tmp_path: Path) -> None:
    out = tmp_path / "races.json"
    args = ["--races", "regression", "--batches", "8", "64", "--target", "0.7", "--seeds", "2"]
    known = BENCH / "results" / "time_to_target_cpu.json"
    text = _run("time_to_target.py", *args, "--tuned", str(known), "--json", str(out))
    found = json.loads(out.read_text())["races"]["regression"]
    assert {"fixed 8", "fixed 64", "noise scale", "AdaScale 32"} <= set(found["methods"])
    for name, row in found["methods"].items():
        assert 0 < row["steps"]["mean"] < row["samples"]["mean"] < 400_000, name
        assert name in text
    fixed = {size: found["methods"][f"fixed {size}"] for size in (8, 64)}
    assert fixed[64]["steps"]["mean"] < fixed[8]["steps"]["mean"]
    assert 0.2 < found["measured_over_known"] < 5


def test_gpu_dry_run() -> None:
    operations = ("linear", "norm", "embedding", "conv", "tied", "multi")
    text = _run("gpu.py", "--dry-run", "--only", *operations)
    assert text.endswith("dry run on the CPU: every check passed\n")


def eventful(args, device, done, tell) -> None:
    """What a process that measures may come to."""
    for name in ("right", "wrong", "dies", "hangs", "right again", "too late"):
        if name in done:
            continue
        tell("begun", name, None)
        if name == "dies":
            os._exit(7)
        if name == "right again":  # longer than the patience, but not without a word
            for _ in range(3):
                time.sleep(0.5)
                tell("alive", "", None)
        if name in ("hangs", "too late"):
            time.sleep(60)
        row = {"case": name, "variant": "norms", "seconds": 1e-3, "ratio": 1.0, "limit": None,
               "ratio_quartiles": [1.0, 1.0], "within": None, "tflops": None, "gb_per_s": None,
               "error": 0.0, "remark": ""}  # fmt: skip
        tell(*(("failed", name, "off by 2") if name == "wrong" else ("rows", name, [row])))
        if name == "wrong":  # as after an error of CUDA's own
            os._exit(1)
    tell("end", "", None)


def test_a_gpu_run_outlives_its_cases(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "METHOD", "fork")  # starts at once
    out = tmp_path / "gpu.json"
    report = {"failed": {}, "rows": []}
    module.supervise(argparse.Namespace(json=out), report, eventful, patience=1)
    written = json.loads(out.read_text())
    assert written == report
    assert [row["case"] for row in written["rows"]] == ["right", "right again"]
    reasons = {
        "wrong": "off by 2",
        "dies": "exit code 7",
        "hangs": "no word",
        "too late": "no word",
    }
    assert set(written["failed"]) == set(reasons)
    assert all(why in written["failed"][name] for name, why in reasons.items())


def test_conformance_of_gradstats_alone(tmp_path: Path) -> None:
    out = tmp_path / "conformance.json"
    _run("conformance.py", "--no-peers", "--json", str(out))
    rows = json.loads(out.read_text())["situations"]
    cells = {name: row["cells"]["gradstats"] for name, row in rows.items()}
    assert not [name for name, cell in cells.items() if cell["verdict"] == "wrong"]
    refused = {name for name, cell in cells.items() if cell["verdict"] == "refused"}
    assert refused <= {"sparse", "by_frequency", "batch_norm", "backward_twice"}


def test_a_rate_is_looked_for_beyond_the_ends_of_a_grid(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("time_to_target")
    tried = []

    def taken(race, size, rate, seeds, best) -> float:
        tried.append(rate)
        return abs(math.log2(rate / wanted))

    monkeypatch.setattr(module, "samples_taken", taken)
    for wanted in (0.25, 1.0, 2.0, 16.0):
        assert module.tuned(None, 8, [0.5, 1.0, 2.0], range(2)) == wanted
    assert 32.0 in tried  # the best one has a worse one on either side
    assert module.tuned(None, 8, [1.0], range(2)) == 1.0
