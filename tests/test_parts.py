"""Small batches against the big one: closed forms, plain autograd, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from biases import assert_unbiased
from torch import nn

import gradstats
from gradstats.estimators import noise_scale, readable
from gradstats.part_source import UnequalPartsWarning
from gradstats.parts import estimate

DIM, SIGMA, STEPS = 8, 1.0, 60_000
TRUE_TR, TRUE_SQ = 4.0 * ((DIM + 1) + DIM * SIGMA**2), 4.0


def regression_parts(sizes, by_samples, seed):
    """(tr Σ, |G|²) of each step, from parts: y = x·w* + ε at a distance of 1 (g = 2x(x·δ − ε))."""
    rng = np.random.default_rng(seed)
    delta = np.full(DIM, DIM**-0.5)
    shares = np.array(sizes) / sum(sizes) if by_samples else np.full(len(sizes), 1 / len(sizes))
    means = []
    for n in sizes:
        x = rng.standard_normal((STEPS, n, DIM))
        q = 2 * (x @ delta - SIGMA * rng.standard_normal((STEPS, n)))
        means.append(np.einsum("kb,kbd->kd", q, x) / max(n, 1))
    parts = np.stack(means, 1) * shares[:, None]
    found = estimate(
        torch.tensor(sizes, dtype=torch.float64),
        torch.from_numpy((parts**2).sum(-1)),
        torch.from_numpy((parts.sum(1) ** 2).sum(-1)),
        by_samples,
    )
    return [f.numpy() for f in found]


@pytest.fixture(
    scope="module",
    params=[
        ([16, 16], False),
        ([8, 8, 8, 8], False),
        ([12, 5, 3, 12], True),
        ([12, 5, 3, 12], False),
        ([20, 0, 12], True),
    ],
    ids=str,
)
def run(request):
    return *regression_parts(*request.param, seed=5), sum(request.param[0])


def test_parts_are_unbiased_for_any_sizes_and_shares(run):
    tr, sq, _ = run
    assert_unbiased(tr, TRUE_TR)
    assert_unbiased(sq, TRUE_SQ)


@pytest.mark.parametrize("steps", [60, 200])
def test_interval_covers(run, steps):
    tr, sq, size = run
    rows = [r[: 300 * steps].reshape(-1, steps) for r in (tr, sq)]
    found = [noise_scale(np.full(steps, size), a, b) for a, b in zip(*rows, strict=True)]
    covered = np.mean([f.low <= TRUE_TR / TRUE_SQ <= f.high for f in found])
    assert 0.85 <= covered <= 0.97


def test_one_part_and_a_part_without_samples_have_no_variance():
    one = estimate(torch.tensor([8.0]), torch.tensor([2.0]), torch.tensor(2.0), True)
    assert all(torch.isnan(v) for v in one)
    empty = estimate(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor(2.0), False)
    assert all(torch.isnan(v) for v in empty)


# --- micro-batches ----------------------------------------------------------------------------


def batch_norm_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def accumulate(model, sizes, weights, step=lambda: None, seed=0):
    """Backwards of micro-batches; returns what each adds to p.grad, by autograd alone."""
    generator = torch.Generator().manual_seed(seed)
    grown = []
    for n, weight in zip(sizes, weights, strict=True):
        x = torch.randn(n, 6, dtype=torch.float64, generator=generator)
        plain = copy.deepcopy(model)
        grads = torch.autograd.grad(weight * plain(x).square().mean(), list(plain.parameters()))
        grown.append(torch.cat([g.flatten() for g in grads]))
        (weight * model(x).square().mean()).backward()
    return torch.stack(grown)


def by_hand(grown, sizes, shares):
    """tr Σ and |G|² by definition, from the parts' own mean gradients."""
    sizes, shares = (torch.tensor(v, dtype=torch.float64) for v in (sizes, shares))
    means = grown / shares[:, None]
    whole = grown.sum(0).square().sum()
    noise = (shares * (1 - shares) / sizes).sum()
    tr = ((shares * means.square().sum(1)).sum() - whole) / noise
    return float(tr), float(whole - tr * (shares**2 / sizes).sum())


@pytest.mark.parametrize(
    ("sizes", "weights", "options"),
    [
        ([4, 4, 4], [1 / 3] * 3, {}),
        ([4, 3, 5], [4 / 12, 3 / 12, 5 / 12], {"weighting": "samples"}),
        ([4, 3, 5], [1 / 3] * 3, {"weighting": "parts"}),
        ([4, 3], [4.0, 3.0], {"loss_reduction": "sum"}),
    ],
)
def test_micro_batches_of_a_model_without_per_sample_gradients(sizes, weights, options) -> None:
    model = batch_norm_model()
    monitor = gradstats.attach(model, method="micro_batch", **options)
    for step in range(3):
        model.zero_grad(set_to_none=step < 2)
        grown = accumulate(model, sizes, weights, seed=step)
        stats = monitor.step()
        total = sum(weights)
        tr, true = by_hand(grown / total, sizes, [w / total for w in weights])
        assert float(stats.tr_sigma) == pytest.approx(tr, rel=1e-9)
        assert float(stats.true_grad_sq_norm) == pytest.approx(true, rel=1e-9, abs=1e-12)
        layers = stats.layers.values()
        assert float(sum(v.tr_sigma for v in layers)) == pytest.approx(tr, rel=1e-9)
        assert (stats.num_samples, stats.method) == (sum(sizes), "micro_batch")
        assert stats.coverage.fraction == 1.0
    noise = monitor.noise_scale()
    assert (noise.method, noise.num_steps) == ("micro_batch", 3)
    assert "by comparing micro-batches" in str(noise)


def test_micro_batches_agree_with_every_sample_on_average() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    exact = gradstats.attach(model)
    monitor = gradstats.attach(model, method="micro_batch", tokens_per_sample=10)
    for _ in range(500):
        model.zero_grad()
        for _ in range(4):
            x = torch.randn(8, 6)
            ((model(x).squeeze(1) - x[:, 0] - torch.randn(8)).square().mean() / 4).backward()
        exact.step()
        monitor.step()
    a, b = exact.noise_scale(), monitor.noise_scale()
    assert b.tr_sigma == pytest.approx(a.tr_sigma, rel=0.15)
    assert b.low < a.value < b.high
    assert b.high / b.low > a.high / a.low
    assert a.tokens is None
    assert b.tokens == 10 * b.value
    assert f"= {readable(b.tokens)} tokens" in str(b)


def test_forwards_that_no_backward_reached_do_not_count() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch")
    for _ in range(2):
        model(torch.randn(50, 6))
        with torch.no_grad():
            model(torch.randn(50, 6))
        (model(torch.randn(3, 6)).mean() + model(torch.randn(2, 6)).mean()).backward()
    assert monitor.step().num_samples == 10


def test_two_live_forwards_are_two_parts() -> None:
    torch.manual_seed(2)
    model = nn.Linear(6, 2).double()
    monitor = gradstats.attach(model, method="micro_batch")
    inputs = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    outputs = [model(x) for x in inputs]
    for out in outputs:
        (out.square().mean() / 2).backward()
    found = monitor.step()
    monitor.detach()
    grown = []
    for x in inputs:
        grads = torch.autograd.grad(model(x).square().mean() / 2, list(model.parameters()))
        grown.append(torch.cat([g.flatten() for g in grads]))
    tr, _ = by_hand(torch.stack(grown), [4, 4], [0.5, 0.5])
    assert float(found.tr_sigma) == pytest.approx(tr, rel=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_one_part_per_backward(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(self.inner, x, use_reentrant=reentrant).tanh()
            return x

    torch.manual_seed(0)
    model = Deep().double()
    monitor = gradstats.attach(model, method="micro_batch")
    grown = []
    for _ in range(2):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        before = [0 if p.grad is None else p.grad.clone() for p in model.parameters()]
        (model(x).square().mean() / 2).backward()
        grown.append(torch.cat([(p.grad - b).flatten()
                                for p, b in zip(model.parameters(), before, strict=True)]))  # fmt: skip
    tr, _ = by_hand(torch.stack(grown), [4, 4], [0.5, 0.5])
    assert float(monitor.step().tr_sigma) == pytest.approx(tr, rel=1e-9)


def test_copies_and_pickles_come_without() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        accumulate_plain(other, [4, 4])
    with pytest.raises(gradstats.NoStatisticsError, match="found no backward pass"):
        monitor.step()


def test_the_number_of_samples_can_be_said() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch", weighting="parts")
    said = [
        {"num_samples": 3},
        {"cu_seqlens": torch.tensor([0, 2, 9])},
        {"ids": torch.tensor([0, 0, 1, 3])},
        {"mask": torch.tensor([True, False, True])},
    ]
    for options in said:
        with monitor.samples(**options):
            model(torch.randn(1, 9, 6)).mean().backward()
    assert monitor.step().num_samples == 3 + 2 + 4 + 2
    with (
        pytest.raises(gradstats.InvalidArgumentError, match="samples\\(\\) needs num_samples="),
        monitor.samples(),
    ):
        pass


def test_unequal_micro_batches_of_unknown_weight_are_left_out_and_warned_of() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch")
    for sizes in ((4, 4), (4, 3), (4, 2)):
        model.zero_grad()
        accumulate_plain(model, sizes[:1])
        accumulate_plain(model, sizes[1:])
        if sizes == (4, 3):
            with pytest.warns(UnequalPartsWarning, match=r"unequal size.*\(4, 3 samples\)"):
                monitor.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                monitor.step()
    noise = monitor.noise_scale()
    assert (noise.num_steps, noise.num_skipped) == (1, 2)
    assert "2 steps left out (not finite, or fewer than two micro-batches of known weight)" in str(
        noise
    )


def accumulate_plain(model, sizes) -> None:
    for n in sizes:
        model(torch.randn(n, 6)).square().mean().backward()


def test_a_single_micro_batch_is_refused_at_first_and_left_out_later() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch")
    accumulate_plain(model, [4])
    with pytest.raises(gradstats.NoStatisticsError, match=r"a single backward\(\).*per_sample"):
        monitor.step()
    accumulate_plain(model, [4, 4])
    monitor.step()
    accumulate_plain(model, [4])
    assert torch.isnan(monitor.step().tr_sigma)
    assert monitor.noise_scale().num_skipped == 1


def test_misuse_is_named() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch")
    with pytest.raises(gradstats.NoStatisticsError, match="found no backward pass"):
        monitor.step()
    accumulate_plain(model, [4, 4])
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(gradstats.OrderError, match="changed in place"):
        monitor.step()
    model.zero_grad()
    out = model(torch.randn(4, 6)).square().mean()
    out.backward(retain_graph=True)
    out.backward()
    with pytest.raises(gradstats.NoStatisticsError, match="ran twice through one forward"):
        monitor.step()
    accumulate_plain(model, [4, 4])  # what went wrong before does not stay
    assert torch.isfinite(monitor.step().tr_sigma)
    monitor.detach()
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "micro_batch", "moments": True}, "moments=True needs each sample's gradient"),
        ({"method": "micro_batch", "sample": "token"}, 'sample="token" needs each'),
        ({"method": "micro_batch", "self_check": 5}, "self_check= needs each"),
        ({"method": "micro_batch", "weighting": "tokens"}, "use 'samples' or 'parts'"),
        ({"weighting": "parts"}, "method='per_sample' sees what weight"),
        (
            {"method": "micro_batch", "weighting": "parts", "loss_reduction": "sum"},
            'contradicts loss_reduction="sum"',
        ),
        ({"calibration": 2.0}, 'is for method="norm_layers" alone'),
        ({"method": "norm_layers", "calibration": -1.0}, "calibration=-1.0 must be"),
        ({"tokens_per_sample": 0}, "tokens_per_sample=0 must be"),
        ({"tokens_per_sample": 8, "sample": "token"}, "left out where tokens are the samples"),
    ],
)
def test_arguments_that_contradict(options, message: str) -> None:
    with pytest.raises(gradstats.InvalidArgumentError, match=message):
        gradstats.attach(nn.Linear(2, 2), **options)


def test_one_process_has_no_ranks_to_compare() -> None:
    with pytest.raises(gradstats.AttachError, match=r"the model is a Linear. Wrap it first"):
        gradstats.attach(nn.Linear(2, 2), method="ranks")


def test_nothing_to_train() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(gradstats.AttachError, match="no trainable parameter"):
        gradstats.attach(model, method="micro_batch")


def test_a_compiled_model_is_attached_to_as_it_is_called() -> None:
    inner = nn.Linear(6, 2)
    model = torch.compile(inner, backend="eager", fullgraph=True)
    early = gradstats.attach(inner, method="micro_batch")
    accumulate_plain(model, [4, 4])
    with pytest.raises(gradstats.NoStatisticsError, match=r"the result of torch\.compile"):
        early.step()
    early.detach()
    monitor = gradstats.attach(model, method="micro_batch")
    model.zero_grad()
    accumulate_plain(model, [4, 4])
    assert torch.isfinite(monitor.step().tr_sigma)


def test_resuming_and_states_of_other_methods() -> None:
    model = nn.Linear(6, 2)
    monitor = gradstats.attach(model, method="micro_batch", every=2)
    for _ in range(5):
        model.zero_grad()
        accumulate_plain(model, [4, 4])
        monitor.step()
    state = json.loads(json.dumps(monitor.state_dict()))
    second = gradstats.attach(model, method="micro_batch", every=2)
    second.load_state_dict(state)
    assert second.noise_scale() == monitor.noise_scale()
    assert second._source.enabled == monitor._source.enabled
    with pytest.raises(gradstats.InvalidArgumentError, match="method='micro_batch'"):
        gradstats.attach(model).load_state_dict(state)


def test_records_of_unlike_methods_do_not_merge() -> None:
    model = nn.Linear(6, 2)
    exact, parts = gradstats.attach(model), gradstats.attach(model, method="micro_batch")
    accumulate_plain(model, [4, 4])
    a, b = exact.step(), parts.step()
    assert b.merge(b).num_samples == 16
    torch.testing.assert_close(b.merge(b).tr_sigma, b.tr_sigma)
    with pytest.raises(gradstats.InvalidArgumentError, match="'per_sample' and 'micro_batch'"):
        a.merge(b)
