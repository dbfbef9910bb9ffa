"""The critical batch size by branches: a known answer, decisions, files, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial

import pytest
import torch
from torch import nn

import gradstats
from gradstats.errors import InvalidArgumentError
from gradstats.schedulers import Seen, noise_scale
from gradstats.workbench import saved
from gradstats.workbench.critical import Settings, Tolerance, decide, measure_critical
from gradstats.workbench.critical.result import Run, smoothed
from gradstats.workbench.workload import load

DIM, NOISE, RATE, BATCH = 16, 1.0, 0.02, 8
KNOWN = Settings(
    multipliers=(1, 4, 16, 64), rule="sqrt", warm_up=0, samples=64 * 8 * BATCH, seeds=3,
    held_out=True,
)  # fmt: skip


def known_workload():
    """y = x·1 + ε from w = 0: the expected loss after any number of SGD steps has a closed form.

    The held-out x and ε are orthogonal with mean squares of 1 and σ², so their loss is |δ|² + σ² exactly.
    """

    def draw(size, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, DIM, generator=generator)
        return x, x.sum(1, keepdim=True) + NOISE * torch.randn(size, 1, generator=generator)

    generator = torch.Generator().manual_seed(3)
    held_out = 8 * torch.linalg.qr(torch.randn(64, DIM + 1, generator=generator)).Q
    scale = torch.tensor([1.0] * DIM + [NOISE])
    model = nn.Linear(DIM, 1, bias=False)
    nn.init.zeros_(model.weight)
    return gradstats.Workload(
        model,
        nn.MSELoss(),
        draw(50_000, 2),
        lambda params: torch.optim.SGD(params, RATE),
        validation=(held_out[:, :DIM], held_out @ scale.reshape(-1, 1)),
        batch_size=BATCH,
    )


def expected_loss(multiplier: int, every: int, evaluations: int) -> float:
    """Smoothed as the measured one. With x ~ N(0, I) and B samples a step, E|δ|² goes to
    (1 − 4η + 4η²(1 + (d+1)/B))·E|δ|² + 4η²dσ²/B, and the loss is E|δ|² + σ²."""
    rate, size = RATE * math.sqrt(multiplier), BATCH * multiplier
    square, losses = float(DIM), [DIM + NOISE**2]
    for _ in range(evaluations):
        for _ in range(every // size):
            square *= 1 - 4 * rate + 4 * rate**2 * (1 + (DIM + 1) / size)
            square += 4 * rate**2 * DIM * NOISE**2 / size
        losses.append(square + NOISE**2)
    return smoothed(losses, 0.5)[-1]


def test_known_answer() -> None:
    torch.manual_seed(0)
    found, content = measure_critical(known_workload(), KNOWN, tolerance=Tolerance(0.05))
    every = content["settings"]["every"]
    known = [expected_loss(m, every, 8) for m in KNOWN.multipliers]
    for branch, loss in zip(found.branches, known, strict=True):
        assert branch.final == pytest.approx(loss, rel=0.05)
        # Three standard errors of the widest: its final loss scatters by 0.018 from seed to seed.
        assert branch.difference == pytest.approx(loss - known[0], abs=0.03)
    # Between ×16, better than the unbranched run, and ×64, which makes too few steps.
    part = (0.05 - (known[2] - known[0])) / (known[3] - known[2])
    size = BATCH * 16 * 4**part
    assert found.critical_batch_size == pytest.approx(size, rel=0.15)
    assert found.low < size < found.high
    assert found.high < 2 * found.low
    assert found.largest_within == 16 * BATCH
    true_noise = ((DIM + 1) * DIM + DIM * NOISE**2) / DIM
    assert found.noise_scale.value == pytest.approx(true_noise, rel=0.15)
    factor = found.calibration
    assert factor.low < size / true_noise < factor.high
    assert factor.value == pytest.approx(found.critical_batch_size / found.noise_scale.value)


def curve(*losses):
    return tuple((64 * i, loss) for i, loss in enumerate(losses))


def runs(*finals, seeds=3, start=2.0):
    """Runs of ×1, ×2, ×4, … that end at these losses; the seeds' scatter is alike in all but a little."""
    shift = [0.1 * (s - 1) for s in range(seeds)]
    own = [0.002, -0.001, -0.001]
    return [
        Run(2**i, s, curve(start, final + shift[s] + (own[(s + i) % 3] if i else 0.0)))
        for i, final in enumerate(finals)
        for s in range(seeds)
    ]


def decided(some, tolerance="0.1", **options):
    rates = {run.multiplier: 0.1 for run in some}
    limit = Tolerance.parse(tolerance)
    return decide(
        some, batch_size=64, learning_rates=rates, tolerance=limit, smoothing=1.0, **options
    )


def test_the_crossing_is_interpolated_and_its_interval_is_of_the_pairs() -> None:
    found = decided(runs(1.0, 1.02, 1.06, 1.3))
    # 0.06 at 256, 0.3 at 512: 0.1 is a sixth of the way on the logarithms.
    assert found.critical_batch_size == pytest.approx(256 * 2 ** (1 / 6), rel=1e-3)
    assert 0.9 * found.critical_batch_size < found.low < found.critical_batch_size
    assert found.critical_batch_size < found.high < 1.1 * found.critical_batch_size
    assert (found.largest_within, found.reached, found.remarks) == (256, True, ())
    assert "critical batch size 287 samples (28" in str(found)


def test_a_share_of_the_fall_as_tolerance() -> None:
    found = decided(runs(1.0, 1.02, 1.06, 1.3), "10%")
    assert found.fall == pytest.approx(1.0)
    assert found.tolerance == pytest.approx(0.1)
    for text in ("0", "-1", "x", "%", "nan", "inf"):
        with pytest.raises(InvalidArgumentError, match="such as 5%"):
            Tolerance.parse(text)


def test_no_end_is_told_from_a_known_one() -> None:
    found = decided(runs(1.0, 1.0, 1.01))
    assert (found.critical_batch_size, found.high, found.reached) == (256.0, None, False)
    assert "at least 256" in str(found)
    assert "larger multipliers" in found.remarks[0]
    one = decided(runs(1.0, 1.0, 1.3, seeds=1))
    assert (one.low, one.high) == (64.0, None)
    assert "one seed gives no interval" in one.remarks[0]


def test_the_factor_holds_both_intervals() -> None:
    noise = gradstats.NoiseScale(100.0, 80.0, 125.0, 0.9, 1000, 20, 0, 100.0, 1.0)
    found = decided(runs(1.0, 1.02, 1.06, 1.3), noise=noise)
    factor, size = found.calibration, found.critical_batch_size
    assert factor.value == pytest.approx(size / 100)
    below = math.hypot(math.log(size / found.low), math.log(1.25))
    above = math.hypot(math.log(found.high / size), math.log(1.25))
    assert factor.low == pytest.approx(factor.value * math.exp(-below))
    assert factor.high == pytest.approx(factor.value * math.exp(above))
    assert found.usable
    assert not decided(runs(1.0, 1.0, 1.3, seeds=1), noise=noise).usable
    assert decided(runs(2.1, 2.1, 2.5), noise=noise).calibration is None
    first = decided(runs(1.0, 1.5, 1.9), noise=noise)  # 64 itself may be too large already
    assert (first.calibration.low, first.usable) == (0.0, False)
    assert math.isfinite(first.calibration.high)


def test_a_diverged_branch_is_outside() -> None:
    some = runs(1.0, 1.02, 1.05)
    some[-1] = Run(4, 2, curve(2.0, 3.0), ok=False)
    found = decided(some)
    assert found.critical_batch_size == found.largest_within == 128
    assert found.high == 128
    assert not found.branches[-1].ok
    assert found.remarks == ("diverged: ×4",)
    assert json.dumps(saved.plain(found.to_dict()))
    with pytest.raises(InvalidArgumentError, match="unbranched run diverged"):
        decided([Run(1, 0, curve(2.0), ok=False), *some[1:]])


@pytest.mark.parametrize(
    ("finals", "tolerance", "remark"),
    [
        ((1.0, 1.5, 1.9), "0.1", "128, the first size tested, is outside already"),
        ((1.99, 2.0, 2.2), "0.05", "is 500% of what the loss fell by"),
        ((2.1, 2.1, 2.5), "0.05", "loss did not fall, so no batch"),
    ],
)
def test_what_the_numbers_cannot_carry_is_said(finals, tolerance, remark) -> None:
    assert any(remark in said for said in decided(runs(*finals), tolerance).remarks)


def test_smoothing_weighs_the_newest() -> None:
    assert smoothed([4.0, 2.0, 2.0], 0.5) == [4.0, 3.0, 2.5]
    assert Run(1, 0, curve(4.0, 2.0, 2.0)).final(0.5) == 2.5
    assert Run(1, 0, curve(4.0), ok=False).final(0.5) == math.inf


def state(workload):
    tensors = [*workload.model.state_dict().values(), torch.get_rng_state()]
    groups = [dict(group, params=None) for group in workload.optimizer.param_groups]
    held = [t for s in workload.optimizer.state.values() for t in s.values() if t is not None]
    return [t.clone() for t in tensors + held], groups


SMALL = Settings(multipliers=(2, 4), warm_up=3, samples=512, evaluations=2, seeds=2)


def test_everything_is_put_back_and_branches_share_their_samples() -> None:
    workload = load("workloads:whole")
    for x, y in zip(range(3), workload.batches(32), strict=False):
        workload.loss(y).backward()
        workload.optimizer.step()
        del x
    workload.optimizer.zero_grad()
    before, groups = state(workload)
    seen: list[torch.Tensor] = []
    take, workload.take = workload.take, lambda i: seen.append(torch.tensor(i)) or take(i)
    found, _ = measure_critical(workload, SMALL)
    after, groups_after = state(workload)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert groups == groups_after
    assert found.branches[1].learning_rate == pytest.approx(2 * 0.05)  # linear, for SGD
    steps = [s for s in seen if len(s) == 32][-6 * 16 :]  # not those of evaluations
    branches = torch.stack(steps).reshape(3, 2, -1)  # multiplier, seed, samples in order
    assert torch.equal(branches[0], branches[1])
    assert torch.equal(branches[0], branches[2])
    assert not torch.equal(branches[0, 0], branches[0, 1])


def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch) -> None:
    whole, _ = measure_critical(load("workloads:whole"), SMALL, out=tmp_path / "whole.json")
    from gradstats.workbench.critical import measuring

    branch, calls = measuring.branch, []

    def dies(*args, **options):
        calls.append(options["multiplier"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return branch(*args, **options)

    out = tmp_path / "killed.json"
    monkeypatch.setattr(measuring, "branch", dies)
    with pytest.raises(KeyboardInterrupt):
        measure_critical(load("workloads:whole"), SMALL, out=out)
    assert len(saved.read(out, "critical")["runs"]) == 3
    again, content = measure_critical(load("workloads:whole", seed=7), SMALL, out=out)
    assert len(calls) == 4 + 3  # the one that died, and the two after it
    assert again == whole
    assert saved.read(out, "critical")["critical_batch_size"] == whole.critical_batch_size
    assert saved.plain(content) == {
        k: v for k, v in saved.read(out, "critical").items() if k not in ("kind", "version")
    }
    with pytest.raises(
        InvalidArgumentError, match="with samples 512, every 256, evaluations 2, to"
    ):
        measure_critical(load("workloads:whole"), Settings(multipliers=(2, 4), warm_up=3), out=out)


def test_checkpoints(tmp_path) -> None:
    path = tmp_path / "c.pt"
    trained = load("workloads:whole")
    for _, batch in zip(range(3), trained.batches(32), strict=False):
        trained.optimizer.zero_grad()
        trained.loss(batch).backward()
        trained.optimizer.step()
    states = {"model": trained.model.state_dict(), "optimizer": trained.optimizer.state_dict()}
    torch.save(states, path)
    here, content = measure_critical(load("workloads:whole", seed=5), SMALL, checkpoint=path)
    warmed, _ = measure_critical(load("workloads:whole"), SMALL)  # the same three steps
    assert here == warmed
    assert content["step"] is None
    for wrong, message in (
        ({"model": {}}, 'holds model; it must hold "model" and "optimizer"'),
        ({**states, "model": {"x": torch.ones(1)}}, "is not of this model"),
    ):
        torch.save(wrong, path)
        with pytest.raises(InvalidArgumentError, match=message):
            measure_critical(load("workloads:whole"), SMALL, checkpoint=path)
    path.write_text("no checkpoint")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        measure_critical(load("workloads:whole"), SMALL, checkpoint=path)


def test_models_without_per_sample_gradients_are_measured_by_batches() -> None:
    x = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    workload = gradstats.Workload(model, nn.MSELoss(), (x, x[:, :1]), batch_size=16)
    buffers = [b.clone() for b in model.buffers()]
    found, _ = measure_critical(workload, Settings(16, (2,), None, 2, 128, 2, False, 64, 2))
    assert found.noise_scale.method == "micro_batch"
    assert found.branches[1].learning_rate == pytest.approx(1e-3 * math.sqrt(2))  # AdamW
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_the_factor_is_given_back() -> None:
    torch.manual_seed(0)
    workload = known_workload()
    with gradstats.attach(workload.model, optimizer=workload.optimizer) as monitor:
        for _, batch in zip(range(60), workload.batches(BATCH), strict=False):
            workload.optimizer.zero_grad()
            workload.loss(batch).backward()
            monitor.step()
        plain, scaled = monitor.recommend(), monitor.recommend(critical=8.0)
        noise = monitor.noise_scale()
    times = {k: 8 * getattr(noise, k) for k in ("value", "low", "high")}
    wanted = gradstats.recommend(dataclasses.replace(noise, **times), batch_size=BATCH)
    assert (scaled.batch_size, scaled.low, scaled.high) == (
        wanted.batch_size, wanted.low, wanted.high,
    )  # fmt: skip
    assert scaled.batch_size > 4 * plain.batch_size
    assert "the critical batch size is 8 times that, as measured by branches" in scaled.reason
    at = {"batch_size": BATCH, "learning_rate": RATE, "optimizer": "SGD"}
    rate = gradstats.recommend(noise, critical=8.0, **at)
    gain = (1 + noise.value / BATCH) / (1 + noise.value / rate.batch_size)
    assert rate.learning_rate == pytest.approx(RATE * gain)  # by the noise scale itself
    seen = Seen(batch_size=BATCH, base_batch_size=BATCH, noise=noise)
    assert noise_scale(seen, factor=8.0) == pytest.approx(8 * noise.value)
    calibration = {"value": 8.0, "low": 2.0, "high": 16.0, "steps": 0}  # as a result file has it
    wider = monitor.recommend(critical=calibration)
    assert wider.batch_size == scaled.batch_size
    assert wider.low < scaled.low
    assert wider.high > scaled.high
    assert "the critical batch size is 8 (2 to 16) times that" in wider.reason
    unknown = monitor.recommend(critical={**calibration, "high": None})
    assert (unknown.batch_size, unknown.high) == (BATCH, None)  # too uncertain to act on
    for wrong in (-1, {"low": 1.0}):
        with pytest.raises(InvalidArgumentError, match=r"critical=.* cannot be used; pass a fac"):
            gradstats.recommend(noise, batch_size=8, critical=wrong)


@pytest.fixture
def run(command_line):
    return partial(command_line, "critical")


QUICK = ("--multipliers", "2,8", "--warm-up", "5", "--samples", "512", "--seeds", "2")


def test_command(run, tmp_path) -> None:
    out, picture = tmp_path / "critical.json", tmp_path / "new" / "critical.png"
    code, text, err = run("workloads:whole", *QUICK, "--out", str(out), "--picture", str(picture))
    found = saved.read(out, "critical")
    assert code == (0 if found["reached"] and found["fall"] > 0 else 1)
    assert "64 (×2)" in text
    assert "critical batch size" in text
    assert err.startswith("critical: 0%, warm-up, step 1 of 5")
    assert picture.read_bytes().startswith(b"\x89PNG")
    again, text, _ = run("workloads:whole", *QUICK, "--out", str(out), "--json")
    assert again == code
    report = json.loads(text)
    assert report["critical_batch_size"] == found["critical_batch_size"]
    assert report["settings"]["rule"] == "linear"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("workloads:dataset",), "the batch size trained with is not known; pass --batch-size"),
        (("workloads:loader", "--held-out"), "has no samples held out; give gradstats.Workload("),
        (("workloads:whole", "--multipliers", "2,x"), "--multipliers '2,x' cannot be used"),
        (("workloads:whole", "--multipliers", "1"), "pass at least one above 1"),
        (("workloads:whole", "--multipliers", "7,11,13"), "pass ones that divide each other"),
        (("workloads:whole", "--rule", "cubic"), "rule='cubic' cannot be used"),
        (("workloads:whole", "--tolerance", "much"), "tolerance 'much' cannot be used"),
        (("workloads:whole", "--smoothing", "0"), "smoothing=0.0 cannot be used"),
        (("workloads:whole", "--picture", "x.doc"), "must end in .png, .svg or .pdf"),
        (("workloads:whole", "--out", "/dev/null/x.json"), "cannot be written"),
        (("workloads:whole", "--checkpoint", "absent.pt"), "absent.pt cannot be read"),
    ],
)
def test_arguments_that_cannot_be_used(run, args, message) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_picture_without_matplotlib_is_refused_at_once(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = run("workloads:whole", "--picture", "x.png")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "run `pip install 'gradstats[demo]'`" in err


def test_interrupted(run, tmp_path, monkeypatch) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradstats.workbench.critical.measuring.branch", interrupted)
    code, out, err = run("workloads:whole", *QUICK, "--out", str(tmp_path / "c.json"))
    assert (code, out) == (130, "")
    assert "the same command goes on from there" in err
