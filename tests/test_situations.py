"""Training situations: each is exact, or says clearly that it is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layers import Checkpointed
from models import loss
from oracle import assert_matches, per_sample_gradients, relative
from torch import nn

import gradstats


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.fixture
def batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_exact(batch, reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model, moments=True)
    for _ in range(2):
        model.zero_grad()
        loss(model, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_two_live_reentrant_checkpoints_are_refused(batch) -> None:
    model = Checkpointed(reentrant=True)
    gradstats.attach(model)
    first, _ = loss(model, batch), loss(model, batch)
    with pytest.raises(gradstats.UnsupportedLayerError, match="use_reentrant=False"):
        first.backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_accumulation_with_an_uneven_last_micro_batch(model, batch, compiled: bool) -> None:
    true = per_sample_gradients(model, loss, batch)
    torch._dynamo.reset()
    monitor = gradstats.attach(model, moments=True)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for _ in range(2):
        model.zero_grad()
        for part in batch.split([3, 2, 1]):
            (loss(run, part) * len(part) / len(batch)).backward()
        stats = monitor.step()
        assert_matches(stats, true, 1e-5)
        assert set(stats.grad_var) == set(true)


def test_summed_loss_has_the_same_units(model, batch) -> None:
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model, moments=True, loss_reduction="sum")
    (loss(model, batch) * len(batch)).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_noise_scale_does_not_depend_on_the_loss_scale(model, batch) -> None:
    found = []
    for scale in (1.0, 1024.0, 1 / 7):
        with gradstats.attach(model) as monitor:
            model.zero_grad()
            (loss(model, batch) * scale).backward()
            found.append(float(monitor.step().noise_scale))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_two_live_forwards_backward_of_the_first(model, batch) -> None:
    true = per_sample_gradients(model, loss, batch[:4])
    monitor = gradstats.attach(model, moments=True)
    first, _ = loss(model, batch[:4]), loss(model, batch[3:])
    first.backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_forward_without_backward_is_forgotten(model, batch) -> None:
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model)
    loss(model, batch[:2])
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_two_forwards_in_one_backward_are_not_guessed(model, batch) -> None:
    monitor = gradstats.attach(model)
    (loss(model, batch[:3]) + loss(model, batch[3:])).backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 0
    assert torch.isnan(stats.tr_sigma)
    assert "backward called twice" in next(iter(stats.coverage.missing.values()))


def test_forwards_of_different_size_in_one_backward_are_refused(model, batch) -> None:
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model, moments=True)
    (loss(model, batch[:2]) + loss(model, batch[2:])).backward()
    with pytest.raises(gradstats.BatchDimError, match="forwards of 4 and of 2 samples"):
        monitor.step()
    model.zero_grad()
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_backward_twice_is_not_covered(model, batch) -> None:
    monitor = gradstats.attach(model)
    value = loss(model, batch)
    value.backward(retain_graph=True)
    value.backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 0
    assert torch.isnan(stats.noise_scale)


def test_parts_called_one_after_the_other_are_one_batch(batch) -> None:
    encoder, head = nn.Linear(6, 4), nn.Linear(4, 2)
    model = nn.ModuleDict({"encoder": encoder, "head": head})

    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m["head"](torch.tanh(m["encoder"](x))).square().sum(1).mean()

    true = per_sample_gradients(model, run, batch)
    monitor = gradstats.attach(model, moments=True)
    run(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_a_penalty_outside_the_forward_is_reported(model, batch) -> None:
    model.add_module("extra", nn.Linear(2, 2))
    monitor = gradstats.attach(model[:4])
    with pytest.raises(gradstats.NoStatisticsError):
        monitor.step()
    monitor.detach()

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    unused = Unused()
    monitor = gradstats.attach(unused)
    loss(unused, batch).backward()
    assert monitor.step().coverage.fraction == 1  # no gradient, no contribution
    unused.zero_grad()
    (loss(unused, batch) + unused.b.square().sum()).backward()
    coverage = monitor.step().coverage
    assert list(coverage.missing) == ["b"]
    assert "outside the model's forward" in coverage.missing["b"]


def test_a_layer_that_mixes_samples_is_reported(batch) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x - x.mean(0)) * self.w.exp())

    model, batch = Mixer(), batch[:5]
    expected = model(batch)
    monitor = gradstats.attach(model)
    out = model(batch)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.square().sum(1).mean().backward()
    stats = monitor.step()
    assert list(stats.coverage.missing) == ["w"]
    assert "differ when each sample runs alone" in stats.coverage.missing["w"]
    assert 0 < stats.coverage.fraction < 1
    assert 0 < monitor.noise_scale().coverage < 1


def test_dropout_draws_the_same_numbers(batch) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    torch.manual_seed(3)
    expected = model(batch)
    gradstats.attach(model)
    torch.manual_seed(3)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=0)


def test_freezing_and_thawing_between_steps(model, batch) -> None:
    monitor = gradstats.attach(model)
    for frozen in ([], [model[0].weight], [model[0].bias, model[3].weight], []):
        model.zero_grad()
        model.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
            p.grad = None
        true = per_sample_gradients(model, loss, batch)
        loss(model, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_changing_batch_size_and_every(model) -> None:
    monitor = gradstats.attach(model, every=3)
    seen = []
    for n in (4, 5, 6, 7, 8, 9, 10):
        model.zero_grad()
        loss(model, torch.randn(n, 6)).backward()
        stats = monitor.step()
        seen.append(stats and stats.num_samples)
    assert seen == [4, None, None, 7, None, None, 10]


class Chain(nn.Sequential):
    """The compiler skips torch's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self:
            x = part(x)
        return x


def test_compiled_in_place_and_run_before_attaching(model, batch) -> None:
    torch._dynamo.reset()
    true = per_sample_gradients(model, loss, batch)
    chain = Chain(*model)
    chain.compile(backend="aot_eager", fullgraph=True)
    loss(chain, batch).backward()
    chain.zero_grad()
    monitor = gradstats.attach(chain)
    loss(chain, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_batch_sizes_than_the_compiler_keeps_graphs(model) -> None:
    torch._dynamo.reset()
    monitor = gradstats.attach(model)
    run = torch.compile(model, backend="aot_eager")
    for n in (2, 3, 4, 5, 3):
        data = torch.randn(n, 6)
        true = per_sample_gradients(model, loss, data)
        model.zero_grad()
        loss(run, data).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_gradients_that_are_zeroed_and_kept(model) -> None:
    monitor = gradstats.attach(model, moments=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        data = torch.randn(6, 6)
        true = per_sample_gradients(model, loss, data)
        for part in data.split([4, 2]):
            (loss(model, part) * len(part) / len(data)).backward()
        assert_matches(monitor.step(), true, 1e-5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def test_inference_mode_is_told_by_the_step(model, batch) -> None:
    monitor = gradstats.attach(model)
    with torch.inference_mode():
        model(batch)
    with pytest.raises(gradstats.NoStatisticsError, match="no_grad or inference_mode"):
        monitor.step()
    loss(model, batch).backward()
    assert monitor.step().coverage.fraction == 1


def test_grad_var_is_accurate_for_nearly_equal_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 3))
    data = torch.randn(1, 9, 20) + 1e-3 * torch.randn(16, 9, 20)
    true = per_sample_gradients(model, loss, data)
    monitor = gradstats.attach(model, moments=True)
    loss(model, data).backward()
    var = monitor.step().grad_var
    for name, g in true.items():
        assert var[name].min() >= 0
        assert relative(var[name], g.var(0)) < 1e-3, name


def test_copies_and_pickles_of_an_attached_model_are_plain(model, batch) -> None:
    keys = list(model.state_dict())
    monitor = gradstats.attach(model, moments=True)
    expected = model(batch)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    for other in (twin, loaded):
        torch.testing.assert_close(other(batch), expected, rtol=0, atol=0)
        loss(other, batch).backward()
        with pytest.raises(gradstats.NoStatisticsError):
            monitor.step()
        other.zero_grad()
        true = per_sample_gradients(other, loss, batch)
        own = gradstats.attach(other)
        loss(other, batch).backward()
        assert_matches(own.step(), true, 1e-5)
        own.detach()
        assert "forward" not in vars(other)
    loss(model, batch).backward()
    assert monitor.step().coverage.fraction == 1


def test_parameters_replaced_after_attaching_are_still_known(model, batch) -> None:
    monitor = gradstats.attach(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    true = per_sample_gradients(model, loss, batch)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)
