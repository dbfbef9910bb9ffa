"""`gradstats bench`: what is timed, its files, comparing them, the function and the fixture."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import gradstats
from gradstats import backends
from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench import saved
from gradstats.workbench.bench import bench, bench_step, compare_files, ops
from gradstats.workbench.bench.ceilings import Ceilings, last_level_cache, measure_ceilings
from gradstats.workbench.bench.compared import change
from gradstats.workbench.bench.files import Timed, stats, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(command_line):
    return partial(command_line, "bench")


# ---- operations ----------------------------------------------------------------------------------


SMALL = {
    "linear": (6, 3, 5, 7), "conv": (6, 4, 6, 8, 3, 2, 2), "embedding": (6, 5, 11, 4),
    "layer_norm": (6, 3, 8), "rms_norm": (6, 3, 8), "group_norm": (6, 8, 9, 2),
    "multi_sq_norm": ((3, 4), (5,)),
}  # fmt: skip


@pytest.mark.parametrize("name", ops.SHAPES)
def test_operations_are_right_and_a_wrong_one_is_not_timed(name, monkeypatch) -> None:
    operation = ops.make(name, SMALL[name])
    for backend in ("reference", "auto"):
        with backends.use(backend):
            assert all(operation.error(moments) <= 1 for moments in (False, True))
    call = ops.Op.call

    def off(self, tensors, moments, by=ops.ops):
        found = list(call(self, tensors, moments, by))
        if by is ops.ops:  # not the reference it is compared with
            at = 0 if self.as_list else self.rows.start
            found[at] = found[at] * (1 + 1e-3)
        return found

    monkeypatch.setattr(ops.Op, "call", off)
    assert operation.error() > 10
    monkeypatch.setitem(ops.SHAPES, name, (ops.SHAPES[name][0], {"small": SMALL[name]}))
    with pytest.raises(GradStatsError, match=f"{name} small with norms is .* so it was not timed"):
        bench(operations=[name], models=(), quick=True, rounds=1)


def test_work_of_operations() -> None:
    linear = ops.make("linear", (2, 3, 5, 7))
    assert linear.flops == 2 * 2 * 3 * 5 * 7
    assert linear.bytes == 4 * (2 * 3 * 5 + 2 * 3 * 7 + 5 * 7 + 7)
    conv = ops.make("conv", (2, 4, 6, 8, 3, 2, 2))  # 4×4 outputs, each of 2 inputs' 3×3
    assert conv.flops == 2 * 2 * 6 * 16 * 2 * 9
    assert conv.bytes == 4 * (2 * 4 * 64 + 2 * 6 * 16 + 6 * 2 * 9 + 6)


def test_ceilings() -> None:
    found = measure_ceilings(rounds=2, matrix_size=64, array_bytes=2**16)
    assert found.bytes_per_second == max(found.copy, found.triad) > 0
    assert 0 <= last_level_cache() < 2**34
    given = dataclasses.replace(found, bytes_per_second=10.0, flops_per_second=100.0)
    assert given.seconds(20.0, 100.0) == (2.0, "bandwidth")
    assert given.seconds(20.0, 400.0) == (4.0, "matrix")
    assert isinstance(given, Ceilings)


# ---- files ---------------------------------------------------------------------------------------


def timed(name, seconds, **extra):
    return Timed("group", name, tuple(seconds), extra)


def file(path, *marks):
    write(path, marks, {"environment": saved.environment()})
    return path


def test_statistics_are_as_pytest_benchmark_has_them() -> None:
    from pytest_benchmark.stats import Stats

    generator = random.Random(0)
    seconds = [generator.lognormvariate(0, 0.3) for _ in range(25)] + [9.0]
    theirs = Stats()
    for second in seconds:
        theirs.update(second)
    ours = stats(seconds)
    for field, value in theirs.as_dict().items():
        if field not in ("q1", "q3", "iqr", "iqr_outliers", "outliers", "ld15iqr", "hd15iqr"):
            assert ours[field] == pytest.approx(value), field
    for field in ("q1", "q3", "iqr"):  # quartiles by another of the usual definitions
        assert ours[field] == pytest.approx(getattr(theirs, field), rel=0.15), field


def alone() -> dict[str, str]:
    """The environment of a pytest that is not one of several side by side, where nothing is timed."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def test_the_real_tool_reads_our_files_and_we_read_its(tmp_path) -> None:
    first = file(tmp_path / "a.json", timed("linear", [0.011, 0.010, 0.012]))
    second = file(tmp_path / "b.json", timed("linear", [0.021, 0.020, 0.022]))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(first), str(second)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "linear" in done.stdout
    assert "11.0000 (1.0)" in done.stdout  # medians, in ms, and their ratio
    assert "21.0000 (1.91)" in done.stdout
    suite = tmp_path / "test_theirs.py"
    suite.write_text("def test_sum(benchmark):\n    benchmark(sum, range(100))\n")
    theirs = tmp_path / "theirs.json"
    args = ["-p", "no:gradstats", "--benchmark-json", str(theirs), "--benchmark-max-time=0.05"]
    command = [sys.executable, "-m", "pytest", "-q", str(suite), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=alone()
    )
    assert done.returncode == 0, done.stdout
    (only,) = compare_files(theirs, theirs).changes
    assert (only.ratio, only.verdict, only.of) == (1.0, "same", "seconds")


# ---- comparing -----------------------------------------------------------------------------------


def noisy(seed, factor=1.0, rounds=15, scatter=0.05):
    generator = random.Random(seed)
    return [factor * generator.lognormvariate(0, scatter) for _ in range(rounds)]


def test_noise_is_no_change_and_a_change_is_found() -> None:
    verdicts = [
        change(timed("x", noisy(s)).to_dict(), timed("x", noisy(-s - 1)).to_dict()).verdict
        for s in range(400)
    ]
    assert sum(verdict != "same" for verdict in verdicts) < 0.03 * 400  # 1%, and small samples
    found = [
        change(timed("x", noisy(s)).to_dict(), timed("x", noisy(-s - 1, 1.15)).to_dict())
        for s in range(100)
    ]
    assert sum(c.verdict == "slower" for c in found) > 90
    covered = sum(c.low < 1.15 < c.high for c in found)
    assert covered > 93


def compare_reference_left_out(old, new, folder):
    plain = timed("plain", noisy(5), variant="plain", reference="plain", ratio=1.0).to_dict()
    for name, mark in (("old.json", old), ("new.json", new)):
        (folder / name).write_text(json.dumps({"benchmarks": [mark, plain]}))
    return [c.name for c in compare_files(folder / "old.json", folder / "new.json").changes]


def test_ratios_are_compared_where_a_reference_was_timed_in_turns(tmp_path) -> None:
    extra = {"reference": "plain", "ratio": 1.05, "ratio_low": 1.04, "ratio_high": 1.06}
    old = timed("x", noisy(0), **extra).to_dict()
    new = timed("x", noisy(1, 2.0), **extra).to_dict()  # the whole machine was twice as slow
    same = change(old, new)
    assert (same.of, same.ratio, same.verdict) == ("ratio to plain", 1.0, "same")
    assert compare_reference_left_out(old, new, tmp_path) == ["x"]
    new["extra_info"]["reference"] = "torch"
    assert change(old, new).verdict == "slower"  # in seconds
    assert change(old, new).ratio == pytest.approx(2.0, rel=0.1)


def test_compare_command(run, tmp_path) -> None:
    old = file(tmp_path / "a.json", timed("x", noisy(0)), timed("y", noisy(1)), timed("gone", [1]))
    new = file(tmp_path / "b.json", timed("x", noisy(2, 1.5)), timed("y", noisy(3, 0.5)))
    code, out, _ = run("--compare", old, new)
    assert code == 1
    assert "slower" in out
    assert "faster" in out
    assert "Only in the old file: gradstats bench::gone" in out
    assert "1 of 2 slower beyond their noise and by 1.1 or more." in out
    assert run("--compare", old, new, "--fail-on", "2")[0] == 0
    code, out, _ = run("--compare", old, new, "--json")
    report = json.loads(out)
    assert (code, report["failed"]) == (1, ["x"])
    assert [c["verdict"] for c in report["changes"]] == ["slower", "faster"]
    assert run("--compare", old, old)[0] == 0


def test_a_comparison_of_few_scattered_rounds_is_readable(run, tmp_path, monkeypatch) -> None:
    """Names whole, and no interval of sixteen digits."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "step examples.digits:training gradstats norms+moments"
    files = [file(tmp_path / f"{n}.json", timed(name, [n, 9.0, 40.0])) for n in (1, 2)]
    code, out, _ = run("--compare", *files)
    assert code == 0
    assert "…" not in out
    assert re.search(r"\d\.\d\d \(\de-\d+–\de\+\d+\)", out), out


# ---- the user's own step -------------------------------------------------------------------------


def test_bench_step_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    batch = (torch.randn(16, 6), torch.randint(2, (16,)))
    before = [p.clone() for p in model.parameters()]
    loss = nn.CrossEntropyLoss()
    found = bench_step(model, loss, batch, optimizer=optimizer, rounds=3, turn_seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert [row.name for row in found.variants] == [
        "plain", "gradstats norms", "gradstats norms+moments",
    ]  # fmt: skip
    plain, norms, _ = (row.rounds for row in found.variants)
    assert found.ratio().median == pytest.approx(sorted(n / p for n, p in zip(norms, plain))[1])  # noqa: B905
    assert "of plain" in str(found)
    with pytest.raises(InvalidArgumentError, match="pass one of 'norms', 'norms\\+moments'"):
        found.ratio("variance")
    with pytest.raises(InvalidArgumentError, match="pass norms or norms\\+moments"):
        bench_step(model, loss, batch, kinds=["all"])


def test_what_cannot_be_measured_is_a_row_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    batch = (torch.randn(8, 4), torch.randn(8, 4))
    found = bench_step(model, nn.MSELoss(), batch, kinds=["norms"], rounds=1, turn_seconds=0)
    assert found.variants[1].status == "refused"
    assert "BatchNorm" in found.variants[1].note
    assert "gradstats norms, refused: " in str(found)
    with pytest.raises(GradStatsError, match=r"could not be timed: .*BatchNorm"):
        found.ratio()


SUITE = """
import torch
from torch import nn

def test_cheap(gradstats_benchmark):
    model = nn.Linear(4, 2)
    batch = (torch.randn(8, 4), torch.randn(8, 2))
    found = gradstats_benchmark(model, nn.MSELoss(), batch, rounds=2, turn_seconds=0)
    assert found.ratio("norms").median > 0
"""


@pytest.mark.parametrize("with_benchmark", [True, False])
def test_fixture(tmp_path, with_benchmark) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    out = tmp_path / "out.json"
    plugins = ["-p", "gradstats.workbench.pytest_plugin"]
    if with_benchmark:
        plugins += ["-p", "pytest_benchmark.plugin", "--benchmark-json", str(out)]
    env = {**alone(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "test_suite.py", *plugins]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    if with_benchmark:
        (mark,) = json.loads(out.read_text())["benchmarks"]
        assert mark["extra_info"]["gradstats"]["gradstats norms"]["ratio"]["median"] > 0


def test_the_plugin_is_named_and_light() -> None:
    assert (
        'gradstats = "gradstats.workbench.pytest_plugin"' in (ROOT / "pyproject.toml").read_text()
    )
    code = (
        "import sys; import gradstats.workbench.pytest_plugin\n"
        "assert not {'torch', 'numpy', 'scipy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- the command ---------------------------------------------------------------------------------


def test_command(run, tmp_path) -> None:
    before = torch.get_num_threads()
    out = tmp_path / "bench.json"
    args = ("--quick", "--ops", "linear,multi_sq_norm", "--models", "mlp", "--threads", "1,2")
    code, text, err = run("workloads:whole", *args, "--rounds", "2", "--out", out)
    assert code == 0, err
    assert torch.get_num_threads() == before
    for words in ("1 thread: memory ", "2 threads: memory ", "linear mlp T=1", "mlp plain",
                  "workloads:whole plain", "torch.func norms"):  # fmt: skip
        assert words in text
    found = saved.read(out, "bench")
    assert [c["threads"] for c in found["ceilings"]] == [1, 2]
    assert len(found["ops"]) == 2 * 5
    for row in found["ops"]:
        ceilings = found["ceilings"][row["threads"] - 1]
        assert row["flops_per_second"] == pytest.approx(
            row["of_ceiling"] * ceilings["flops_per_second"], rel=1e-6
        ) or (row["limit"] == "bandwidth")
        assert (row["ratio"] == 1) == (row["variant"] == "torch")
    marks = {mark["name"]: mark for mark in found["benchmarks"]}
    assert marks["linear mlp T=1 norms, threads 2"]["extra_info"]["op"] == "linear"
    steps = {(row["model"], row["variant"]): row for row in found["steps"]}
    assert steps["workloads:whole", "gradstats norms"]["ratio"] > 0
    assert all(row["status"] in ("ok", "refused") for row in found["steps"])
    assert err.startswith("bench: 0%, ceilings of 1 threads")
    code, out, _ = run("--ops", "none", "--no-steps", "--quick", "--json")
    report = json.loads(out)
    assert (code, report["ops"], report["steps"], len(report["ceilings"])) == (0, [], [], 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ops", "pool"), "ops pool are not known here; use linear, conv"),
        (("--models", "llama"), "models llama are not known here; use mlp"),
        (("--threads", "two"), "'two' is not a whole number"),
        (("--rounds", "0"), "rounds=0 cannot be used"),
        (("workloads:dataset",), "the batch size to time is not known; pass --batch-size"),
        (("workloads:absent",), "'absent' in module 'workloads' is not there"),
        (("--compare", "no.json", "no.json"), "no.json cannot be read"),
        (("--compare", "pyproject.toml", "pyproject.toml"), "is not JSON from line 1"),
        (
            ("--out", "/dev/null/x.json", "--ops", "none", "--no-steps", "--quick"),
            "cannot be written",
        ),
    ],
)
def test_arguments_that_cannot_be_used(run, args, message, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert len([line for line in err.splitlines() if not line.startswith("bench: ")]) == 1


def test_files_of_something_else(tmp_path, run) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"benchmarks": [{"fullname": "x"}]}')
    one, two = file(tmp_path / "1.json", timed("x", [1, 2])), file(tmp_path / "2.json")
    code, _, err = run("--compare", other, one)
    assert code == 2
    assert "holds no benchmarks of pytest-benchmark" in err
    assert "have no benchmark in common" in run("--compare", one, two)[2]
    code, _, err = run("--compare", one, one, "--fail-on", "0.5")
    assert code == 2
    assert "--fail-on 0.5 cannot be used" in err


def test_interrupted(run, tmp_path, monkeypatch) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradstats.workbench.bench.steps.measure", interrupted)
    out = tmp_path / "b.json"
    code, text, err = run("--quick", "--ops", "layer_norm", "--models", "mlp", "--out", out)
    assert (code, text) == (130, "")
    assert f"what was timed is in {out}" in err
    assert len(saved.read(out, "bench")["ops"]) == 3
    assert gradstats.__version__
