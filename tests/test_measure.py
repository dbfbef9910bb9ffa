"""`gradstats measure`: known noise scales, everything put back, and what the command prints."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
import workloads
from torch import nn

import gradstats
from gradstats.errors import GradStatsError, InvalidArgumentError, UnsupportedLayerError
from gradstats.loggers import read_lines
from gradstats.workbench import saved
from gradstats.workbench.measure import measure, overhead

QUICK = {"overhead": False, "timing": False}


class Linear:
    """y = x·w + noise at a weight δ away from w: tr Σ and |G|² are known."""

    def __init__(self, dim=6, noise=1.0, size=200_000):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(size, dim, generator=generator)
        delta = torch.full((dim,), 0.5)
        y = noise * torch.randn(size, 1, generator=generator)
        self.model = nn.Linear(dim, 1, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(delta)
        sq = float(delta @ delta)
        self.true = ((dim + 1) * sq + dim * noise**2) / sq  # 4[(d+1)|δ|² + dσ²] / 4|δ|²
        self.workload = gradstats.Workload(
            self.model, nn.MSELoss(), (x, y), lambda params: torch.optim.SGD(params, 0.1)
        )


def test_the_noise_scale_is_the_known_one():
    known = Linear()
    found = measure(known.workload, batch_size=64, steps=200, frozen=True, **QUICK)
    assert found.noise.low < known.true < found.noise.high
    assert found.noise.value == pytest.approx(known.true, rel=0.1)
    assert found.noise.num_samples == 200 * 64
    assert (found.steps, found.stopped, found.coverage) == (200, "steps", 1.0)
    (layer,) = found.layers
    assert layer.share == 1
    assert layer.noise.value == pytest.approx(found.noise.value)
    assert [row["step"] for row in found.rows] == [1, *range(10, 201, 10)]


def test_it_ends_when_the_interval_is_narrow_enough():
    known = Linear()
    options = {"batch_size": 64, "steps": 2000, "frozen": True, **QUICK}
    wide, narrow = (measure(known.workload, precision=p, **options) for p in (1.6, 1.1))
    assert (wide.stopped, narrow.stopped) == ("precision", "precision")
    assert 30 <= wide.steps < narrow.steps < 2000
    assert narrow.noise.high <= 1.1 * narrow.noise.low
    assert wide.noise.high > 1.1 * wide.noise.low


def state(workload):
    """All that a step may change, as bytes."""
    tensors = list(workload.model.state_dict().values())
    for entry in workload.optimizer.state.values():
        tensors += [v for v in entry.values() if isinstance(v, torch.Tensor)]
    held = [t.numpy().tobytes() for t in tensors]
    return held, torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize("frozen", [False, True])
def test_everything_is_put_back(frozen):
    made = workloads.whole()
    made.loss(next(made.batches(8))).backward()
    made.optimizer.step()
    gradients = [p.grad.clone() for p in made.model.parameters()]
    before = state(made)
    seen = []

    def look(_):
        seen.append(made.model[0].weight.detach().clone())

    measure(made, steps=12, frozen=frozen, report=look, timing=not frozen)
    assert state(made) == before
    assert all(
        torch.equal(p.grad, g) for p, g in zip(made.model.parameters(), gradients, strict=True)
    )
    assert "forward" not in made.model.__dict__
    moved = any(not torch.equal(w, made.model[0].weight) for w in seen)
    assert moved != frozen


def test_layers_add_up_to_the_whole():
    found = measure(workloads.whole(), steps=40, **QUICK)
    assert {layer.name for layer in found.layers} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    shares = [layer.share for layer in found.layers]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    total = sum(layer.noise.tr_sigma for layer in found.layers)
    assert total == pytest.approx(found.noise.tr_sigma, rel=1e-5)


def test_micro_batches_make_up_the_step():
    whole, parts = (
        measure(workloads.whole(), batch_size=32, micro_batch_size=m, steps=5, **QUICK)
        for m in (32, 8)
    )
    assert parts.noise.num_samples == whole.noise.num_samples == 160
    compared = measure(
        Linear().workload, batch_size=64, micro_batch_size=4, steps=300, frozen=True,
        method="micro_batch", **QUICK,
    )  # fmt: skip
    assert compared.noise.low < Linear().true < compared.noise.high


def test_tokens_are_counted_and_the_advice_is_in_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    text = torch.randint(11, (64, 13))

    def loss(model, batch):
        return nn.functional.cross_entropy(
            model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        )

    made = gradstats.Workload(model, loss, text, lambda p: torch.optim.SGD(p, 0.1))
    found = measure(made, batch_size=16, steps=20, sample="token", overhead=False)
    assert found.tokens_per_sample == 12
    assert found.noise.num_samples == 20 * 16 * 12
    assert found.advice.present_batch_size == 16


def test_the_optimizers_eyes():
    made = workloads.whole()
    adam = gradstats.Workload(made.model, made.loss_fn, made.data, torch.optim.Adam, batch_size=32)
    found = measure(adam, steps=15, geometry=("adam",), **QUICK)
    assert found.geometries["adam"].geometry == "adam"


def test_step_times_and_overhead():
    found = measure(workloads.whole(), steps=3)
    assert found.overhead.plain > 0
    assert found.overhead.low <= found.overhead.ratio <= found.overhead.high
    assert {p.micro_batch_size for p in found.timing.points} == {8, 16, 32, 64, 128}
    assert found.advice.seconds is not None
    given = measure(workloads.whole(), steps=3, micro_batch_size=8, overhead=False)
    assert {p.micro_batch_size for p in given.timing.points} == {2, 4, 8}


def test_overhead_is_that_of_neighbouring_steps(monkeypatch):
    clock, steps = [0.0], []

    def step():  # measured, plain, measured, …, on a machine that grows slower all the time
        steps.append(1)
        clock[0] += (0.3 if len(steps) % 2 else 0.2) * 1.02 ** len(steps)

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    found = overhead.compare_steps(step, torch.device("cpu"))
    assert found.ratio == pytest.approx(1.5, rel=0.03)
    assert found.low <= found.ratio <= found.high
    assert len(steps) == 4 + 2 * found.pairs == 4 + 2 * overhead.FEWEST


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    made = workloads.whole()
    before = state(made)
    rows = []

    def interrupt(reached):
        rows.append(reached.row)
        if reached.step == 20:
            raise KeyboardInterrupt

    found = measure(made, steps=100, report=interrupt)
    assert (found.stopped, found.steps) == ("interrupted", 20)
    assert found.rows == tuple(rows)
    assert found.noise.num_steps == 20
    assert found.advice is not None
    assert found.overhead is None
    assert state(made) == before


def test_what_cannot_be_measured_is_refused():
    norm = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    made = gradstats.Workload(norm, nn.MSELoss(), workloads.regression(64), batch_size=16)
    with pytest.raises(UnsupportedLayerError, match="BatchNorm"):
        measure(made, steps=2, **QUICK)
    found = measure(made, steps=4, micro_batch_size=4, method="micro_batch", **QUICK)
    assert found.settings.batch_norm == ("1",)
    assert found.noise.num_steps == 4

    def broken(model, batch):
        raise ZeroDivisionError("no luck")

    with pytest.raises(
        GradStatsError, match="step 1 of the workload, with 4 samples at once, failed: Ze"
    ):
        measure(gradstats.Workload(norm, broken, made.data), batch_size=4, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1024}, "batch_size=1024 cannot be used; the data has 512 samples"),
        ({"micro_batch_size": 5}, "pass a divisor of batch_size=32"),
        ({"method": "ranks"}, "several processes"),
        ({"method": "micro_batch"}, "compares several a step"),
        ({"method": "guess"}, "method='guess' is not known"),
        ({"precision": 1.0}, "pass a factor above 1"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        measure(workloads.whole(), **options)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(command_line):
    return partial(command_line, "measure")


def test_it_speaks_to_people_and_writes_its_files(run, tmp_path):
    log, out = tmp_path / "run.jsonl", tmp_path / "measure.json"
    code, text, err = run("workloads:whole", "--steps", "40", "--log", str(log), "--out", str(out))
    assert code == 0
    assert "measure: 2%, step 1 " in err
    for words in ("noise scale", "0.weight", "measured: 100%", "Recommendation",
                  "a step takes", "run.jsonl"):  # fmt: skip
        assert words in text
    content = saved.read(out, "measure")
    rows, spoilt = read_lines(log)
    assert (rows, spoilt) == (content["rows"], 0)
    assert content["noise_scale"]["num_steps"] == content["steps"] == 40
    assert content["step_seconds"]["ratio"] > 0
    assert content["timing"]["points"]
    assert content["advice"]["present_batch_size"] == content["batch_size"] == 32
    assert set(content["layers"][0]) >= {"name", "share", "tr_sigma", "noise_scale"}
    assert content["environment"]["versions"]["torch"] == torch.__version__


def test_json_has_standard_output_to_itself(run):
    args = ("workloads:loader", "--steps", "20", "--no-timing", "--no-overhead", "--json")
    code, out, err = run(*args)
    found = json.loads(out)
    assert code == 0
    assert "measure: 5%, step 1 " in err
    assert (found["timing"], found["step_seconds"], found["batch_size"]) == (None, None, 32)
    again = json.loads(run(*args)[1])  # the same model, data and numbers
    assert again["noise_scale"] == found["noise_scale"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["no_such:thing"], 2, "cannot be imported"),
        (["workloads:whole", "--batch-size", "0"], 2, "batch_size=0"),
        (["workloads:whole", "--geometry", "round"], 2, "geometry='round'"),
        (["workloads:whole", "--out", "/dev/null/x.json"], 2, "/dev/null/x.json cannot be written"),
        (
            ["workloads:whole", "--log", "/dev/null/x.jsonl"],
            2,
            "/dev/null/x.jsonl cannot be written",
        ),
        (["workloads:no_scalar"], 2, "must give the mean loss"),
        (["workloads:whole", "--batch-size", "1", "--steps", "5"], 1, ""),
    ],
)
def test_exit_codes(run, args, code, message):
    seen, _, err = run(*args, "--no-timing", "--no-overhead")
    assert seen == code
    said = [line for line in err.splitlines() if not line.startswith("measure: ")]
    assert message in "".join(said)
    assert len(said) == bool(message)


def test_ctrl_c_exits_with_130_and_files_are_whole(run, tmp_path, monkeypatch):
    out = tmp_path / "measure.json"
    made = workloads.whole()
    loss, calls = type(made).loss, []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(type(made), "loss", interrupted)
    code, text, _ = run("workloads:whole", "--out", str(out))
    assert code == 130
    assert "Interrupted: what follows was measured until then" in text
    assert saved.read(out, "measure")["steps"] == 24


def test_a_full_disk_loses_nothing_that_was_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    args = ("--steps", "15", "--no-timing", "--no-overhead", "--out", str(tmp_path / "x.json"))
    code, out, err = run("workloads:whole", *args)
    assert code == 2
    assert "noise scale" in out
    assert "cannot be written (No space left)" in err
