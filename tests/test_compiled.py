"""Inside torch.compile(fullgraph=True): parameters with several uses, recurrent layers, flattened rows."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from layers import Tied, Twice
from models import PROBLEMS, loss
from oracle import assert_matches, per_sample_gradients
from test_shared import Cancelling, Loop, TiedTwice
from test_where_samples_are import Flattening
from torch import Tensor, nn

import gradstats


class HeadFirst(nn.Module):
    """A product with the table before it is looked up, and its transpose after that."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(13, 6, padding_idx=2), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.inner(F.one_hot(ids, 13).to(self.table.weight.dtype)[..., :6]))
        shares = torch.softmax(F.linear(x, self.table.weight), -1)
        x = x + shares @ self.table.weight + self.table(ids) + self.table(ids.flip(1))
        return self.inner(torch.tanh(x))


def sequence(n: int) -> Tensor:
    return torch.randn(n, 7, 6)


def ids(n: int) -> Tensor:
    return torch.randint(0, 13, (n, 7))


def compiled(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


SHARED = [(Twice, sequence), (Loop, sequence), (Tied, ids), (TiedTwice, ids), (HeadFirst, ids)]


@pytest.mark.parametrize(("make", "data"), SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_uses_are_exact(make, data, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, batch = make(), data(5)
    plain = copy.deepcopy(model)
    true = per_sample_gradients(model, loss, batch)
    model = model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    monitor = gradstats.attach(model)
    run = compiled(model)
    for _ in range(2):
        model.zero_grad()
        loss(run, batch).backward()
        assert_matches(monitor.step(), true, 1e-5 if dtype == torch.float32 else 1e-10)
    loss(plain, batch.float() if batch.is_floating_point() else batch).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=1e-4, atol=1e-5)


def test_several_uses_with_inductor_and_micro_batches() -> None:
    torch.manual_seed(0)
    model, batch = Tied(), ids(6)
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model)
    run = compiled(model, "inductor")
    for part in batch.split([4, 2]):
        (loss(run, part) * len(part) / len(batch)).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_uses_that_cancel_leave_no_negative_norm() -> None:
    torch.manual_seed(0)
    model = Cancelling()
    monitor = gradstats.attach(model)
    (compiled(model)(torch.randn(50, 9, 16)) * torch.randn(16)).sum(1).mean().backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 1.0
    sq_norm = stats.layers["inner.weight"].per_sample_sq_norm
    assert sq_norm.min() >= 0
    assert sq_norm.max() < 1e-2  # of terms near 1e4


def test_moments_of_several_uses_are_said_to_be_unmeasured() -> None:
    model = Twice()
    monitor = gradstats.attach(model, moments=True)
    loss(compiled(model), sequence(5)).backward()
    missing = monitor.step().coverage.missing
    assert set(missing) == {"inner.weight", "inner.bias"}
    assert "used more than once" in missing["inner.weight"]
    assert "does not run in a compiled forward" in missing["inner.weight"]


@pytest.mark.parametrize("name", ["lstm", "lstm_deep", "gru", "rnn"])
@torch._dynamo.config.patch(allow_rnn=True)  # else the compiler refuses them
def test_recurrent_layers_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model, batch = PROBLEMS[name].make(), PROBLEMS[name].data(5)
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model, moments=True)
    run = compiled(model)
    for _ in range(2):
        model.zero_grad()
        loss(run, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_the_models_that_follow_in_one_process_compile_too() -> None:
    torch._dynamo.reset()
    for _ in range(3):  # no reset between them: they share the compiler's memory of the code
        torch.manual_seed(0)
        model, batch = Twice(), sequence(5)
        true = per_sample_gradients(model, loss, batch)
        monitor = gradstats.attach(model)
        loss(torch.compile(model, fullgraph=True, backend="aot_eager"), batch).backward()
        assert_matches(monitor.step(), true, 1e-5)
        monitor.detach()


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_flattened_rows_are_exact(sequence_first: bool, told: bool) -> None:
    """Found by one forward before, or told by the rows' samples."""
    torch.manual_seed(0)
    batch = torch.randint(0, 11, (4, 5))
    plain, model = Flattening(False), Flattening(True, sequence_first)
    model.load_state_dict(plain.state_dict())
    true = per_sample_gradients(plain, loss, batch)
    monitor = gradstats.attach(model, moments=True)
    rows = torch.arange(20) % 4 if sequence_first else torch.arange(20) // 5
    if not told:
        model(batch)
    run = compiled(model)
    for _ in range(2):
        model.zero_grad()
        with monitor.samples(rows) if told else contextlib.nullcontext():
            loss(run, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_flattened_rows_that_nothing_was_found_of_are_refused_with_the_way_out() -> None:
    model = Flattening(True)
    gradstats.attach(model)
    with pytest.raises(Exception, match="run one forward before you compile") as refused:
        compiled(model)(torch.randint(0, 11, (4, 5)))
    assert "layer 'norm' got an input of shape (20, 6)" in str(refused.value)


def test_packed_sequences_of_changing_lengths() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    monitor = gradstats.attach(model)
    run = compiled(model)
    for lengths in ([3, 1, 5, 2], [2, 2, 1, 6], [4, 3, 2, 1]):
        rows = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        tokens = torch.randint(0, 11, (len(rows),))
        true: dict[str, list[Tensor]] = {}
        wide = copy.deepcopy(model).double()
        for i in range(4):
            wide.zero_grad()
            wide(tokens[rows == i]).sin().sum().backward()
            for name, p in wide.named_parameters():
                true.setdefault(name, []).append(p.grad.clone())
        model.zero_grad()
        with monitor.samples(rows):
            (run(tokens).sin().sum() / 4).backward()
        assert_matches(monitor.step(), {n: torch.stack(g) for n, g in true.items()}, 1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_two_backwards_through_one_forward_are_not_two_batches(backend: str) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 6)
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model)
    run = compiled(model, backend)
    out = run(batch)
    out[:2].square().sum().backward(retain_graph=True)
    out.square().sum().backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 0
    assert "backward called twice" in stats.coverage.missing["0.weight"]
    assert torch.isnan(stats.noise_scale)
    for _ in range(2):  # one forward after the other is two batches, of equal samples too
        model.zero_grad()
        loss(run, batch).backward()
        loss(run, batch).backward()
        stats = monitor.step()
        assert stats.num_samples == 10
        twice = {name: torch.cat((2 * g, 2 * g)) for name, g in true.items()}
        assert_matches(stats, twice, 1e-5)
