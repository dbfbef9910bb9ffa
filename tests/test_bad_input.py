"""Bad input gives an error that names the place and the way out, or a documented result.

In every case the training loop can go on: the next good step is measured again.
"""

from __future__ import annotations

import math

import pytest
import torch
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _good_step(monitor, model, n: int = 5) -> None:
    batch = torch.randn(n, *(6,))
    model.zero_grad()
    true = per_sample_gradients(model, loss, batch)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_batch_of_one_has_no_variance(model) -> None:
    monitor = gradstats.attach(model, moments=True)
    loss(model, torch.randn(1, 6)).backward()
    stats = monitor.step()
    assert stats.num_samples == 1
    assert torch.isnan(stats.tr_sigma)
    assert torch.isnan(stats.noise_scale)
    assert stats.grad_var == {}
    assert float(stats.mean_sq_norm) == pytest.approx(float(stats.grad_sq_norm), rel=1e-5)
    noise = monitor.noise_scale()
    assert math.isnan(noise.value)
    assert noise.num_skipped == 1
    assert "no variance" in str(noise)
    _good_step(monitor, model)
    assert monitor.noise_scale().num_steps == 1


def test_batch_of_none(model) -> None:
    monitor = gradstats.attach(model, moments=True)
    model(torch.randn(0, 6)).sum().backward()
    stats = monitor.step()
    assert stats.num_samples == 0
    assert stats.per_sample_sq_norm.shape == (0,)
    assert torch.isnan(stats.tr_sigma)
    _good_step(monitor, model)
    assert monitor.noise_scale().num_skipped == 1


def test_no_trainable_parameter(model) -> None:
    with pytest.raises(
        gradstats.AttachError, match=r"no trainable parameter.*requires_grad_\(True\)"
    ):
        gradstats.attach(model.requires_grad_(False))
    with pytest.raises(gradstats.AttachError, match="no trainable parameter"):
        gradstats.attach(nn.ReLU())


def test_what_is_no_module_is_refused(model) -> None:
    with pytest.raises(
        gradstats.AttachError, match=r"takes the model, an nn\.Module, not generator"
    ):
        gradstats.attach(model.parameters())


@pytest.mark.parametrize("what", ["ids", "cu_seqlens", "mask"])
def test_samples_takes_tensors(model, what: str) -> None:
    told = gradstats.attach(model).samples(**{what: [0, 1]})
    with (
        pytest.raises(
            gradstats.InvalidArgumentError, match=rf"samples\({what}=\) takes a tensor.*not list"
        ),
        told,
    ):
        pass


def test_step_without_backward(model) -> None:
    monitor = gradstats.attach(model)
    with pytest.raises(gradstats.NoStatisticsError, match=r"after loss.backward\(\)"):
        monitor.step()
    with torch.no_grad():
        model(torch.randn(5, 6))
    with pytest.raises(gradstats.NoStatisticsError, match="no_grad"):
        monitor.step()
    _good_step(monitor, model)
    with pytest.raises(gradstats.NoStatisticsError):
        monitor.step()


def test_eval_mode_is_measured(model) -> None:
    monitor = gradstats.attach(model.eval())
    _good_step(monitor, model)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode_is_refused_by_name(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, affine=affine)))
    batch = torch.randn(4, 3, 6, 6)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    monitor = gradstats.attach(model)
    with pytest.raises(
        gradstats.UnsupportedLayerError,
        match=r"layer '1\.0': BatchNorm in training mode.*eval.*GroupNorm.*micro_batch",
    ):
        model(batch)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    model.eval()
    model(batch).square().sum().backward()
    assert monitor.step().coverage.fraction == 1
    monitor.detach()
    model.train()(batch)


def test_batch_dimension_that_differs_is_refused_by_name(model) -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.folded = nn.Linear(6, 4), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.folded(self.a(x).t())

    folding = Folding()
    monitor = gradstats.attach(folding)
    with pytest.raises(
        gradstats.BatchDimError,
        match=r"layer 'folded' got .*\(4, 5\).*batch of 5 samples.*batch_dim",
    ):
        folding(torch.randn(5, 6))
    with pytest.raises(gradstats.NoStatisticsError):
        monitor.step()


def test_a_parameter_laid_over_the_samples_is_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.rows

    model = Rows()
    gradstats.attach(model)
    with pytest.raises(gradstats.UnsupportedLayerError, match="'rows' of shape"):
        model(torch.randn(5, 3))


def test_no_tensor_no_samples(model) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self) -> torch.Tensor:
            return self.w.square().sum()

    model = Constant()
    gradstats.attach(model)
    with pytest.raises(gradstats.BatchDimError, match="without a tensor that has a dimension 0"):
        model()


def test_attaching_twice(model) -> None:
    monitor = gradstats.attach(model)
    with pytest.raises(gradstats.AttachError, match="attached to a monitor already"):
        gradstats.attach(model)
    with pytest.raises(gradstats.AttachError, match="attached to a monitor already"):
        gradstats.attach(nn.Sequential(model, nn.Linear(3, 3)))
    _good_step(monitor, model)
    monitor.detach()
    monitor.detach()
    with pytest.raises(gradstats.GradStatsError, match="was detached"):
        monitor.step()
    with gradstats.attach(model) as again:
        _good_step(again, model)


def test_a_parameter_of_another_attached_model(model) -> None:
    gradstats.attach(model)
    other = nn.Linear(6, 8)
    other.weight = model[0].weight
    with pytest.raises(gradstats.AttachError, match="'weight' belongs to another model"):
        gradstats.attach(other)


def test_non_finite_gradients_are_skipped_and_counted(model) -> None:
    monitor = gradstats.attach(model)
    _good_step(monitor, model)
    before = monitor.noise_scale()
    batch = torch.randn(5, 6)
    batch[2, 3] = torch.inf
    model.zero_grad()
    loss(model, batch).backward()
    stats = monitor.step()
    assert not torch.isfinite(stats.tr_sigma)
    after = monitor.noise_scale()
    assert (after.num_steps, after.num_skipped) == (1, 1)
    assert (after.tr_sigma, after.num_samples) == (before.tr_sigma, before.num_samples)
    assert "1 step" in str(after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rank"}, "method='rank' is not known here; use 'per_sample' or"),
        ({"loss_reduction": "none"}, "use 'mean' or 'sum'"),
        ({"every": 0}, "every=0 must be a whole number of at least 1"),
        ({"every": "often"}, "every='often'"),
        ({"batch_dim": -1}, "batch_dim=-1"),
        ({"half_life": -2.0}, "half_life"),
        ({"confidence": 1.5}, "confidence"),
        (
            {"optimizer": [0.1]},
            r"optimizer=\[0.1\] has no param_groups; pass a torch.optim.Optimizer",
        ),
    ],
)
def test_arguments_out_of_range(model, options, message: str) -> None:
    with pytest.raises(gradstats.InvalidArgumentError, match=message):
        gradstats.attach(model, **options)
    assert "forward" not in vars(model)


def test_sparse_and_frequency_scaled_embeddings_are_refused() -> None:
    for option in ({"sparse": True}, {"scale_grad_by_freq": True}):
        model = nn.Sequential(nn.Embedding(5, 3, **option))
        gradstats.attach(model)
        with pytest.raises(gradstats.UnsupportedLayerError, match="layer '0': an embedding with"):
            model(torch.zeros(2, 3, dtype=torch.long))


def test_data_parallel_and_several_devices_are_refused(model) -> None:
    with pytest.raises(gradstats.AttachError, match="DistributedDataParallel"):
        gradstats.attach(nn.DataParallel(model))
    model.append(nn.Linear(2, 2, device="meta"))
    with pytest.raises(gradstats.AttachError, match="several devices"):
        gradstats.attach(model)


def test_named_backend_that_cannot_run_raises(model) -> None:
    gradstats.attach(model)
    value = loss(model, torch.randn(5, 6))
    with gradstats.backends.use("triton"), pytest.raises(gradstats.BackendError, match="triton"):
        value.backward()
    unknown = pytest.raises(gradstats.InvalidArgumentError, match="backend 'fpga' does not exist")
    with unknown, gradstats.backends.use("fpga"):
        pass


def test_an_empty_environment_variable_asks_for_no_backend(monkeypatch) -> None:
    monkeypatch.setenv("GRADSTATS_BACKEND", "")
    assert gradstats.backends.forced() == "auto"
    monkeypatch.setenv("GRADSTATS_BACKEND", "gpu")
    with pytest.raises(gradstats.InvalidArgumentError, match="backend 'gpu' does not exist"):
        gradstats.backends.forced()
    monkeypatch.undo()
    gradstats.backends.forced()


def test_recommend_before_any_step(model) -> None:
    monitor = gradstats.attach(model)
    with pytest.raises(gradstats.NoStatisticsError, match="at least one measured step"):
        monitor.recommend()
    assert math.isnan(monitor.noise_scale().value)


def test_state_of_another_model_is_refused(model) -> None:
    state = gradstats.attach(model).state_dict()
    other = gradstats.attach(nn.Linear(2, 2))
    with pytest.raises(gradstats.InvalidArgumentError, match="of another model"):
        other.load_state_dict(state)
    with pytest.raises(gradstats.InvalidArgumentError, match="version 1, not 7"):
        other.load_state_dict({"version": 7})
    with pytest.raises(
        gradstats.InvalidArgumentError, match=r"what state_dict\(\) gave, not NoneType"
    ):
        other.load_state_dict(None)
