"""`gradstats.check`: exact models pass, and what is wrong is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import PROBLEMS, loss
from torch import nn

import gradstats
from gradstats.probes import row_gradient
from gradstats.rules import RULES, rule


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().flatten(1).sum(1).mean()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PROBLEMS)
def test_supported_models_are_exact(name: str) -> None:
    problem = PROBLEMS[name]
    model = problem.make()
    report = gradstats.check(model, loss, problem.data(6))
    assert report.ok, report
    assert (report.batch_dim, report.loss_reduction, report.mixing) == (0, "mean", None)
    assert [layer.name for layer in report.layers] == [n for n, _ in model.named_parameters()]
    for layer in report.layers:
        if layer.path == "frozen":
            assert layer.error is layer.error_float64 is None
        else:
            assert layer.error < 1e-4
            assert layer.error_float64 < 1e-9
    if problem.ruled:
        assert all(layer.path != "fallback" for layer in report.layers)


def test_fallbacks_tell_their_cost_and_reason() -> None:
    report = gradstats.check(PROBLEMS["one_plus"].make(), loss, PROBLEMS["one_plus"].data(6))
    layers = {layer.name: layer for layer in report.layers}
    assert layers["weight"].path == "fallback"
    assert layers["weight"].fallback_bytes == 6 * 4 * (6 + 6 * 3 + 3)
    assert "no rule covers its use in add" in layers["weight"].reason
    assert "fallback, 0.0 MB" in str(report)


class Doubled(torch.autograd.Function):
    """x + b, with a wrong number for b in `what`."""

    @staticmethod
    def forward(ctx, x, b, row, what):
        ctx.what = what
        return x + b

    @staticmethod
    def backward(ctx, g):
        sq, db = g.square().sum(1), g.sum(0)
        sq = 2 * sq if ctx.what == "norms" else sq
        return g, 2 * db if ctx.what == "gradient" else db, row_gradient(sq), None


@pytest.fixture(params=["norms", "gradient"])
def broken_rule(request):
    @rule(torch.hypot)
    def hypot(use, func, x, b):
        return Doubled.apply(x, b, use.probe(b).row, request.param)

    yield
    del RULES[torch.hypot]


class Hypot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(6, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _hypot(self.inner(x), self.shift)


def _hypot(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, b)


def test_a_broken_rule_is_caught_and_its_parameter_named(broken_rule, monkeypatch) -> None:
    # Without the rule the parameter is just added, as the rule pretends.
    monkeypatch.setattr(sys.modules[__name__], "_hypot", _add_or_hypot)
    report = gradstats.check(nn.Sequential(Hypot(), nn.Linear(4, 2)), squares, torch.randn(5, 6))
    assert not report.ok
    assert [layer.name for layer in report.layers if layer.wrong] == ["0.shift"]
    assert len(report.problems) == 1
    assert "'0.shift' (Hypot) is measured wrongly, by 1e+00" in report.problems[0]
    assert "WRONG rule" in str(report)
    assert "1 problem; 4 of 5 trainable parameters are exact" in report.sentence


def _add_or_hypot(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    attached = getattr(b, "_gradstats", None) is not None
    return torch.hypot(x, b) if attached else x + b


def test_a_rule_that_fails_is_reported(monkeypatch) -> None:
    def hypot(use, func, x, b):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setitem(RULES, torch.hypot, hypot)
    report = gradstats.check(Hypot(), squares, torch.randn(5, 6))
    assert not report.ok
    assert len(report.problems) == 1
    assert "not with gradstats attached: ZeroDivisionError: no such luck" in report.problems[0]
    assert all(layer.path == "uncovered" for layer in report.layers)
    assert "0 of 3 trainable parameters" in report.sentence


def test_a_model_that_cannot_be_copied_is_said() -> None:
    model = nn.Linear(6, 2)
    model.kept = model(torch.randn(3, 6))
    with pytest.raises(gradstats.InvalidArgumentError, match="Linear cannot be copied"):
        gradstats.check(model, squares, torch.randn(5, 6))


def test_samples_in_the_second_dimension_are_found() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    def last(model: nn.Module, batch) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"])[-1], batch["y"])

    batch = {"x": torch.randn(7, 5, 6), "y": torch.randint(0, 3, (5,))}
    report = gradstats.check(Last(), last, batch)
    assert report.ok, report
    assert (report.batch_dim, report.batch_size) == (1, 5)
    assert report.attach_call == "gradstats.attach(model, batch_dim=1)"


def test_a_loss_that_joins_samples_is_found() -> None:
    def contrastive(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        z = F.normalize(model(batch), dim=1)
        return F.cross_entropy(z @ z.t() * 3, torch.arange(len(batch)))

    report = gradstats.check(nn.Linear(6, 3), contrastive, torch.randn(6, 6))
    assert (report.ok, report.mixing, report.loss_reduction) == (False, None, None)
    assert "loss_fn joins the samples" in report.problems[0]


def test_a_penalty_in_the_loss_is_found() -> None:
    def penalised(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return squares(model, batch) + model.weight.square().sum()

    report = gradstats.check(nn.Linear(6, 3), penalised, torch.randn(6, 6))
    assert [layer.name for layer in report.layers if layer.wrong] == ["weight"]
    assert "as a penalty does" in report.problems[0]


@pytest.mark.parametrize(
    ("loss_fn", "reduction", "call"),
    [
        (nn.CrossEntropyLoss(), "mean", "gradstats.attach(model)"),
        (F.cross_entropy, "mean", "gradstats.attach(model)"),
        (partial(F.cross_entropy, reduction="sum"), "sum",
         "gradstats.attach(model, loss_reduction='sum')"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])), "weighted",
         "gradstats.attach(model)"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]) / len(b[1]) ** 0.5, "weighted",
         "gradstats.attach(model)"),
    ],
)  # fmt: skip
def test_the_loss_reduction_is_found(loss_fn, reduction: str, call: str) -> None:
    batch = torch.randn(7, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    report = gradstats.check(nn.Linear(6, 3), loss_fn, batch)
    assert report.ok, report
    assert (report.loss_reduction, report.attach_call) == (reduction, call)


def test_what_gradstats_does_not_measure_is_named() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.prior = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    def with_prior(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return squares(model, batch) + model.prior.square().sum()

    report = gradstats.check(Beside(), with_prior, torch.randn(6, 6))
    assert [layer.name for layer in report.layers if layer.path == "uncovered"] == ["prior"]
    assert "'prior' (Beside) is not measured: " in report.problems[0]
    assert "outside the model's forward" in report.problems[0]
    unused = gradstats.check(Beside(), squares, torch.randn(6, 6))
    assert (unused.ok, unused.layers[0].path) == (True, "unused")


def test_what_gradstats_refuses_is_reported() -> None:
    sparse = gradstats.check(nn.Embedding(5, 3, sparse=True), squares, torch.arange(6) % 5)
    assert sparse.problems[0].startswith("the model: an embedding with")

    class Given(nn.Module):  # ambiguous in the whole batch only, where there are as many positions
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            at = (x[0, :, 0] * 0 + 1).cumsum(0).long()
            return self.head(torch.tanh(x + self.positions(at)))

    assert gradstats.check(Given(), squares, torch.randn(6, 7, 6)).ok
    report = gradstats.check(Given(), squares, torch.randn(7, 7, 6))
    assert "layer 'positions': 7 ids could be one id per sample" in report.problems[0]
    assert {layer.path for layer in report.layers} == {"uncovered"}


def test_a_model_that_needs_its_own_dtype_is_compared_in_it() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.float())

    report = gradstats.check(Narrow(), squares, torch.randn(6, 6))
    assert report.ok, report
    assert report.reference_dtype == "float32"
    assert "does not run in float64" in report.notes[0]
    half = gradstats.check(nn.Linear(6, 3).bfloat16(), squares, torch.randn(6, 6).bfloat16())
    assert (half.ok, half.dtype, half.reference_dtype) == (True, "bfloat16", "float64")


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[3].eval()
    batch = torch.randn(6, 6)
    model(batch).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    given = batch.clone()
    gradstats.check(model, squares, batch)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
        assert not hasattr(p, "_gradstats")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch, given)
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())


def test_an_attached_model_can_be_checked() -> None:
    model, batch = nn.Linear(6, 2), torch.randn(5, 6)
    monitor = gradstats.attach(model)
    assert gradstats.check(model, squares, batch).ok
    with pytest.raises(gradstats.NoStatisticsError):
        monitor.step()
    squares(model, batch).backward()
    assert monitor.step().num_samples == 5


def test_dropout_is_left_out_and_other_random_numbers_are_named() -> None:
    class Noisy(nn.Module):
        def __init__(self, wild: bool) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 4, 2, batch_first=True, dropout=0.5), nn.Linear(4, 2)
            self.wild = wild

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(self.rnn(x)[0], 0.5, self.training)
            return self.head(x + torch.randn_like(x) if self.wild else x)

    batch = torch.randn(5, 3, 6)
    assert gradstats.check(Noisy(False), squares, batch).ok
    report = gradstats.check(Noisy(True), squares, batch)
    assert "random even without dropout" in report.problems[0]


def test_json_holds_everything() -> None:
    report = gradstats.check(nn.Linear(6, 2), squares, torch.randn(5, 6))
    seen = json.loads(json.dumps(report.as_json()))
    assert seen["ok"] is True
    assert seen["attach"] == "gradstats.attach(model)"
    assert [layer["name"] for layer in seen["layers"]] == ["weight", "bias"]
    assert {"batch_dim", "loss_reduction", "problems", "notes", "mixing", "num_samples"} <= set(
        seen
    )


@pytest.mark.parametrize(
    ("model", "loss_fn", "batch", "message"),
    [
        (nn.Linear(6, 2), squares, torch.randn(1, 6), "1 sample in dimension 0.*at least 2"),
        (nn.Linear(6, 2), lambda m, b: m(b), torch.randn(3, 6), r"scalar tensor, not \(3, 2\)"),
        (nn.Linear(6, 2), lambda m, b: b.sum(), torch.randn(3, 6), "must use its argument"),
        (nn.Linear(6, 2), F.mse_loss, torch.randn(3, 6), r"batch must be a pair \(x, y\)"),
        (nn.Linear(6, 2), lambda out, y: out.sum(), torch.randn(3, 6), r"loss_fn\(model, batch\)"),
        (nn.Linear(6, 2).requires_grad_(False), squares, torch.randn(3, 6), "no trainable"),
        (nn.Linear(6, 2), 3, torch.randn(3, 6), "is a int, which cannot be called"),
        (nn.Linear(6, 2), lambda m, b: m(b).sum() * 0, torch.randn(3, 6), "every gradient is zero"),
        (nn.Linear(6, 2), squares, torch.full((3, 6), torch.nan), "not finite on the first 3 samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_said(model, loss_fn, batch, message: str) -> None:
    with pytest.raises(gradstats.InvalidArgumentError, match=message):
        gradstats.check(model, loss_fn, batch)


def test_no_module_of_the_package_hides_a_function() -> None:
    code = (
        "import gradstats; gradstats.check, gradstats.Monitor, gradstats.CheckReport\n"
        "print(all(callable(getattr(gradstats, n)) for n in ('attach', 'check', 'recommend', 'rule')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
