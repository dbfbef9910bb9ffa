"""The learning-rate range test: known stable and best rates, no trace left, rules told apart honestly."""

from __future__ import annotations

import json
import math
import random
from functools import partial

import lr_workloads
import numpy as np
import pytest
import torch

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.kept import kept
from gradstats.workbench import saved
from gradstats.workbench.lr_range import fingerprint, fit_scaling, lr_range
from gradstats.workbench.lr_range.chart import text_chart
from gradstats.workbench.lr_range.curve import best_rate, read_curve
from gradstats.workbench.lr_range.runs import Runs
from gradstats.workbench.workload import workload

# --- known answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("curvatures", [(8.0,), (0.1, 1.0, 8.0), (0.01, 0.01, 300.0)])
def test_the_upper_end_is_the_largest_stable_rate(curvatures) -> None:
    stable = 2 / max(curvatures)
    (curve,) = lr_range(lr_workloads.quadratic(curvatures), repeats=2).curves
    assert curve.high <= stable * 1.05
    assert curve.diverged_at >= stable
    assert curve.diverged_at <= 1.1 * curve.high * (1 + 1e-9)
    assert curve.low < curve.suggested <= stable / 2 * 1.1
    assert curve.high_spread == (curve.high, curve.high)  # there is no noise


def test_momentum_moves_the_upper_end() -> None:
    """Heavy ball is stable up to 2(1 + β)/λ."""
    made = lr_workloads.quadratic((8.0,), momentum=0.5)
    (curve,) = lr_range(made, repeats=2, steps=60).curves
    assert curve.high <= 3 / 8 * 1.05
    assert curve.diverged_at >= 3 / 8 * 0.99


def test_the_saturating_rule_is_found_where_it_holds() -> None:
    """One step of SGD under gradient noise: max 0.5, and the noise scale of the regression."""
    made = lr_workloads.regression()
    found = lr_range(
        made,
        batch_sizes=(2, 16, 128),
        steps=1,
        repeats=12,
        window=(0.02, 1.2),
        loss_samples=3000,
        seed=3,
    )
    for curve in found.curves:
        true = 0.5 / (1 + made.noise_scale / curve.batch_size)
        assert abs(math.log(curve.best / true)) < 4 * curve.best_log_error
    scaling = found.scaling
    assert scaling.rule == "saturating"
    assert scaling.noise_scale_low / 1.3 < made.noise_scale < scaling.noise_scale_high * 1.3
    assert scaling.max_rate == pytest.approx(0.5, rel=0.1)
    assert not {"linear", "sqrt", "constant"} & set(scaling.possible)


# --- rules over batch sizes -------------------------------------------------------------------

SIZES = np.array([8, 32, 128, 512, 2048])
LAWS = {
    "linear": 1e-3 * SIZES,
    "sqrt": 1e-2 * np.sqrt(SIZES),
    "constant": np.full(5, 0.3),
    "saturating": 0.5 / (1 + 200 / SIZES),
}


@pytest.mark.parametrize("law", LAWS)
def test_rules_are_told_apart(law) -> None:
    draw = np.random.default_rng(0)
    errors = np.full(5, 0.1)
    rates = LAWS[law] * np.exp(draw.normal(0, errors))
    found = fit_scaling(SIZES, rates, errors, degrees=20)
    assert found.rule == law
    if law == "saturating":
        assert found.noise_scale_low < 200 < found.noise_scale_high
        assert "B_noise" in str(found)
    else:
        true = {"linear": 1, "sqrt": 0.5, "constant": 0}[law]
        assert found.low < true < found.high


def test_what_cannot_be_told_is_said() -> None:
    found = fit_scaling([8, 16, 32], [0.1, 0.17, 0.3], [0.5] * 3, degrees=6)
    assert found.rule is None
    assert {"linear", "sqrt"} <= set(found.possible)
    assert found.low < 0.5 < 1 < found.high
    assert "cannot tell between" in str(found)
    none = fit_scaling([8, 16, 32], [0.1, 1.0, 0.1], [0.05] * 3, degrees=6)
    assert none.possible == ()
    assert "none of the rules holds" in str(none)


def test_the_interval_of_the_exponent_holds_it() -> None:
    """In 90% of draws: of 200 about 180, with a standard deviation of 4."""
    draw = np.random.default_rng(5)
    errors = np.full(5, 0.2)
    hits = 0
    for _ in range(200):
        rates = LAWS["sqrt"] * np.exp(draw.normal(0, errors))
        found = fit_scaling(SIZES, rates, errors, degrees=1000)
        hits += found.low < 0.5 < found.high
    assert 165 <= hits <= 197  # wider where the scatter of five points is larger than told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([8, 16], [0.1, 0.2], [0.1, 0.1]), "three or more different sizes"),
        (([8, 16, 16], [0.1, 0.2, 0.2], [0.1] * 3), "three or more different sizes"),
        (([8, 16, 32], [0.1, -0.2, 0.2], [0.1] * 3), "above 0"),
    ],
)
def test_scaling_of_too_little_is_refused(arguments, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        fit_scaling(*arguments, degrees=3)


# --- reading a curve --------------------------------------------------------------------------


def test_the_range_is_where_the_loss_falls_by_more_than_its_noise() -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    losses = np.array(
        [
            [1.01, 0.94, 0.60, 0.20, 0.90, math.inf],
            [0.98, 0.93, 0.61, 0.30, 1.10, math.inf],
            [1.00, 0.95, 0.59, 0.25, 0.95, 0.9],
        ]
    )
    curve = read_curve(32, 1.0, rates, losses)
    assert (curve.low, curve.high, curve.diverged_at) == (1e-2, 1e-1, 1.0)  # 1e-3: under a tenth
    assert curve.high_spread == (1e-1, 10.0) or curve.high_spread is None
    assert curve.best == pytest.approx(0.1, rel=4)
    assert curve.suggested <= 0.5
    assert curve.losses[-1] == math.inf
    flat = read_curve(32, 1.0, rates[:3], np.array([[1.0, 1.1, 0.9], [1.1, 0.9, 1.0]]))
    assert (flat.low, flat.high, flat.suggested, flat.best) == (None,) * 4


def test_the_best_rate_of_a_parabola_lies_between_the_rates_tried() -> None:
    rates = np.array([0.1, 0.2, 0.4])
    tops = np.array([0.24, 0.26])
    falls = np.array([2 * rates / top - (rates / top) ** 2 for top in tops])
    best, error = best_rate(rates, falls)
    middle = (2 / tops).sum() / (2 / tops**2).sum()
    assert best == pytest.approx(middle)
    assert error > math.log(0.26 / 0.24) / 2


def test_a_text_chart_shows_the_range() -> None:
    (curve,) = lr_range(lr_workloads.quadratic((8.0,)), repeats=2).curves
    chart = text_chart(curve)
    assert len({len(line) for line in chart.splitlines()[:12]}) == 1
    for mark in "●▲┄━◆":
        assert mark in chart


# --- no trace ---------------------------------------------------------------------------------

OPTIMIZERS = {
    name: getattr(torch.optim, name)
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam")
}


def test_all_of_torchs_dense_optimizers_are_here() -> None:
    assert {"SGD", "Adam", "AdamW", "LBFGS", "Rprop", "ASGD", "Adafactor"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_is_as_before_with_every_optimizer(name) -> None:
    made = lr_workloads.everything(OPTIMIZERS[name])
    before = fingerprint(made.model, made.optimizer)
    untouched = [p.clone() for p in made.model.parameters()]
    found = lr_range(made, steps=2, repeats=2, window=(1e-2, 3e-2))
    assert found.before == found.after == before == fingerprint(made.model, made.optimizer)
    assert all(map(torch.equal, made.model.parameters(), untouched))
    assert found.steps_taken >= 2 * 2 * 5
    same = len(set(found.curves[0].losses)) == 1
    assert same == (name == "Rprop")  # whose rate is for the first step alone
    assert same == ("The loss is the same at every rate" in str(found))


def test_rates_that_are_tensors_and_groups_keep_their_ratio() -> None:
    made = lr_workloads.everything()
    first, last = made.model.parameters()
    groups = [{"params": [first], "lr": torch.tensor(0.2)}, {"params": [last], "lr": 0.1}]
    made.optimizer = torch.optim.SGD(groups, lr=0.3)
    runs = Runs(made, steps=1, loss_samples=8, seed=0)
    seen = []
    made.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([float(g["lr"]) for g in optimizer.param_groups])
    )
    runs.loss(0.02, 8, 0)
    assert seen == [pytest.approx([0.02, 0.01])]
    runs.put_back()
    assert [float(g["lr"]) for g in made.optimizer.param_groups] == pytest.approx([0.2, 0.1])


def test_the_fingerprint_sees_every_part() -> None:
    def change(part, made):
        if part == "weights":
            made.model.first.weight.data[0, 0] = 3.0
        elif part == "gradients":
            made.model.last.weight.grad[0, 0] += 1
        elif part == "buffers":
            made.model.norm.running_mean[0] += 1e-6
        elif part == "modes":
            made.model.drop.eval()
        elif part == "optimizer state":
            made.optimizer.state[made.model.last.weight]["step"] += 1
        elif part == "hyperparameters":
            made.optimizer.param_groups[0]["lr"] *= 2
        else:
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    made = lr_workloads.everything(torch.optim.Adam)
    parts = list(fingerprint(made.model, made.optimizer))
    for part in parts:
        made = lr_workloads.everything(torch.optim.Adam)
        before = fingerprint(made.model, made.optimizer)
        change(part, made)
        after = fingerprint(made.model, made.optimizer)
        assert [name for name in parts if after[name] != before[name]] == [part]


def test_what_could_not_be_restored_is_an_error() -> None:
    made = lr_workloads.everything()
    runs = Runs(made, steps=1, loss_samples=8, seed=0)
    runs._put_back = lambda: made.model.norm.running_mean.add_(1)
    with pytest.raises(GradStatsError, match="the buffers could not be restored"):
        runs.put_back()


def test_state_can_be_put_back_again_and_again() -> None:
    """LBFGS keeps lists of tensors and changes them in place."""
    made = lr_workloads.everything(torch.optim.LBFGS)
    put_back = kept([made.model, made.optimizer])
    before = fingerprint(made.model, made.optimizer)
    for _ in range(3):
        made.optimizer.step(lambda: made.loss(made.take(range(8))).detach().requires_grad_())
        made.optimizer.state[made.model.first.weight]["old_dirs"].append(torch.ones(3))
        put_back()
        assert fingerprint(made.model, made.optimizer) == before


@pytest.mark.parametrize("what", [KeyboardInterrupt, RuntimeError])
def test_interrupts_and_errors_leave_no_trace(what) -> None:
    made = lr_workloads.everything()
    before = fingerprint(made.model, made.optimizer)
    loss, calls = made.loss, []

    def ends(batch):
        calls.append(1)
        if len(calls) > 200:
            raise what("now")
        return loss(batch)

    made.loss = ends
    if what is KeyboardInterrupt:
        found = lr_range(made, steps=2, window=(1e-4, 1.0))
        assert found.interrupted
        assert len(found.curves) == 1
        assert len(found.curves[0].learning_rates) > 2
    else:
        with pytest.raises(RuntimeError, match="now"):
            lr_range(made, steps=2)
    assert fingerprint(made.model, made.optimizer) == before


# --- refusals, and the command ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"repeats": 1}, "repeats=1 must be at least 2"),
        ({"batch_sizes": [8, 0]}, "batch_sizes=0"),
        ({"window": (1.0, 0.1)}, "0 < low < high"),
    ],
)
def test_bad_arguments(options, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        lr_range(lr_workloads.everything(), **options)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(GradStatsError, match="before the first step is nan"):
        lr_range(workload(lr_workloads.not_finite()))


def test_an_optimizer_without_a_rate_is_refused() -> None:
    made = lr_workloads.everything()
    made.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(InvalidArgumentError, match=r"rates are \[0.0\]; one must be above 0"):
        lr_range(made)


@pytest.fixture
def run(command_line):
    return partial(command_line, "lr-range")


def test_the_command_writes_prints_and_draws(run, tmp_path) -> None:
    out, picture = tmp_path / "rates.json", tmp_path / "rates.png"
    files = ["--out", str(out), "--picture", str(picture)]
    code, said, _ = run("lr_workloads:quadratic", "--repeats", "2", *files)
    assert code == 0
    assert "learning rates" in said
    assert "have the same hash as before" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    (curve,) = saved.read(out, "lr_range")["curves"]
    assert curve["high"] == pytest.approx(0.25, rel=0.1)
    code, said, err = run(
        "lr_workloads:regression", "--batch-sizes", "8,64,512", "--steps", "1",
        "--repeats", "5", "--lowest", "0.01", "--highest", "2", "--json",
    )  # fmt: skip
    found = json.loads(said)
    assert (code, [c["batch_size"] for c in found["curves"]]) == (0, [8, 64, 512])
    assert found["scaling"]["low"] < found["scaling"]["exponent"] < found["scaling"]["high"]
    assert "lr-range: " in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (
            ["lr_workloads:upwards", "--steps", "1"],
            1,
            "at no rate tried",
        ),
        (["lr_workloads:absent"], 2, "'absent' in module 'lr_workloads' is not there"),
        (["lr_workloads:upwards", "--batch-sizes", "8;9"], 2, "whole numbers with commas"),
        (["lr_workloads:upwards", "--lowest", "1"], 2, "--lowest and --highest go together"),
        (["lr_workloads:upwards", "--out", "/dev/null/x"], 2, "cannot be written"),
        (["lr_workloads:upwards", "--picture", "x.doc"], 2, "must end in .png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_had_is_told(run, args, code, words) -> None:
    seen, said, err = run(*args)
    assert seen == code
    assert words in said + err
