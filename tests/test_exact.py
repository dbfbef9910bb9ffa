"""Every layer and situation against the oracle: eagerly, compiled, and in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import PROBLEMS, loss
from oracle import assert_matches, per_sample_gradients

import gradstats
from gradstats.fallback import FallbackWarning

RULED = [name for name, problem in PROBLEMS.items() if problem.ruled and problem.compiles]


def _setup(name: str, seed: int):
    torch.manual_seed(seed)
    problem = PROBLEMS[name]
    model, batch = problem.make(), problem.data(problem.batch)
    return model, batch, per_sample_gradients(model, loss, batch)


def _run(name, model, batch, **options):
    with warnings.catch_warnings():
        # What rules serve needs no fallback.
        warnings.simplefilter("error" if PROBLEMS[name].ruled else "ignore", FallbackWarning)
        monitor = gradstats.attach(model, moments=True, **options)
        loss(model, batch).backward()
    return monitor.step()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_statistics_are_exact(name: str, backend: str) -> None:
    model, batch, true = _setup(name, 1)
    with gradstats.backends.use(backend):
        stats = _run(name, model, batch)
    assert_matches(stats, true, 1e-5)
    assert set(stats.grad_var) == set(true)


@pytest.mark.parametrize("name", PROBLEMS)
def test_float64_stays_float64(name: str) -> None:
    model, batch, true = _setup(name, 2)
    wide = batch.double() if batch.is_floating_point() else batch
    stats = _run(name, model.double(), wide)
    assert stats.per_sample_sq_norm.dtype == torch.float64
    assert_matches(stats, true, 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients_do_not_change(name: str) -> None:
    model, batch, _ = _setup(name, 3)
    plain = copy.deepcopy(model)
    expected = plain(batch)
    loss(plain, batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = gradstats.attach(model)
        out = model(batch)
        loss(model, batch).backward()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, n
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * q.grad.abs().max())
    monitor.detach()
    assert "forward" not in vars(model)
    assert not any(hasattr(p, "_gradstats") for p in model.parameters())
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", RULED)
def test_compiled_fullgraph_is_exact(name: str) -> None:
    model, batch, true = _setup(name, 4)
    torch._dynamo.reset()
    monitor = gradstats.attach(model, moments=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for backend in ("auto", "reference"):
        model.zero_grad()
        with gradstats.backends.use(backend):
            loss(compiled, batch).backward()
            assert_matches(monitor.step(), true, 1e-5)


def test_compiled_with_inductor_and_attached_after_compiling() -> None:
    model, batch, true = _setup("positions", 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    loss(compiled, batch).backward()
    model.zero_grad()
    monitor = gradstats.attach(compiled, moments=True)
    for _ in range(2):
        model.zero_grad()
        loss(compiled, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)
