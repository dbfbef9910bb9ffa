"""Modules that are measured sample by sample: what comes out, and what they leave behind."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch
from models import PROBLEMS, loss
from oracle import assert_matches, per_sample_gradients
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats.fallback import FallbackWarning


class Gain(nn.Module):
    """(1 + weight): no rule, so the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * (1 + self.weight)


def measured(model: nn.Module, batch: Tensor, **options: object) -> gradstats.Monitor:
    """Attached, after one backward of the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        monitor = gradstats.attach(model, **options)
        loss(model, batch).backward()
    return monitor


def test_a_module_at_two_paths_is_put_back() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Gain()
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model, batch = Both(), torch.randn(4, 3, 6)
    true = per_sample_gradients(model, loss, batch)
    before = dict(model.named_parameters())
    monitor = measured(model, batch)
    assert_matches(monitor.step(), true, 1e-5)
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 3)])
def test_where_the_samples_come_out_does_not_depend_on_the_first_batch(sizes) -> None:
    """The state is (layers, B, H): of one sample, in one layer, both dimensions are 1 long."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(6, 5, proj_size=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, (state, _) = self.inner(x)
            return out + state.mean((0, 2))[:, None, None]

    torch.manual_seed(0)
    model, batch = Projected(), torch.randn(sum(sizes), 4, 6)
    true = per_sample_gradients(model, loss, batch)
    plain = copy.deepcopy(model)
    expected = [plain(part) for part in batch.split(sizes)]
    monitor = gradstats.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for part, want in zip(batch.split(sizes), expected, strict=True):
            torch.testing.assert_close(model(part), want, rtol=1e-5, atol=1e-6)
            (loss(model, part) * len(part) / len(batch)).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_an_argument_as_long_as_a_later_batch_is_not_taken_for_samples() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return mask @ (x * (1 + self.gain))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mask = Masked(), torch.randn(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.mask.to(x.dtype))

    torch.manual_seed(0)
    model, batch = Model(), torch.randn(5, 5, 6)
    expected, true = model(batch), per_sample_gradients(model, loss, batch)
    monitor = measured(model, batch[:3])
    monitor.step()
    model.zero_grad()
    torch.testing.assert_close(model(batch), expected)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


class Recomputed(nn.Module):
    """A checkpoint inside a module that the fallback runs."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.gain)
        if x.dtype == torch.float64:  # the oracle
            return torch.tanh(self.inner(x))
        return torch.tanh(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def test_a_checkpoint_inside_is_exact() -> None:
    torch.manual_seed(0)
    model, batch = Recomputed(False), torch.randn(4, 3, 6)
    true = per_sample_gradients(model, loss, batch)
    monitor = measured(model, batch)
    assert_matches(monitor.step(), true, 1e-5)
    model.zero_grad()
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_a_reentrant_checkpoint_inside_is_said_to_be_unmeasured() -> None:
    torch.manual_seed(0)
    model, batch = Recomputed(True), torch.randn(4, 3, 6)
    plain = copy.deepcopy(model)
    loss(plain, batch).backward()
    missing = measured(model, batch).step().coverage.missing
    assert list(missing) == ["gain"]
    assert "use_reentrant=False" in missing["gain"]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_rounding_of_autocast_is_not_taken_for_samples_that_mix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 6), Gain())
    outer = nn.Sequential(model, model)  # used twice, with moments: all of it sample by sample
    batch = torch.randn(7, 5, 6)
    monitor = gradstats.attach(outer, moments=True)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore", FallbackWarning)
        out = outer(batch)
    out.float().square().sum().backward()
    assert monitor.step().coverage.fraction == 1.0


class Tagger(nn.Module):
    """Sequences of several lengths, packed for the LSTM, as its users write it."""

    def __init__(self, enforce_sorted: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)
        self.enforce_sorted = enforce_sorted

    def forward(self, batch: Tensor) -> Tensor:
        ids, lengths = batch[:, :-1], batch[:, -1]
        packed = pack_padded_sequence(
            self.tokens(ids), lengths, batch_first=True, enforce_sorted=self.enforce_sorted
        )
        out, (state, _) = self.lstm(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=ids.shape[1])
        return self.head(torch.cat((padded, state.transpose(0, 1).flatten(1)[:, None]), 1))


@pytest.mark.parametrize("lengths", [(3, 7, 1, 5), (7, 7, 7, 7), (2,)])
def test_packed_sequences_are_exact(lengths: tuple[int, ...]) -> None:
    """The rows of all sequences come out as one tensor: the LSTM alone could not tell them apart."""
    torch.manual_seed(0)
    ids = torch.randint(9, (len(lengths), 7))
    batch = torch.cat((ids, torch.tensor(lengths)[:, None]), 1)
    model = Tagger()
    true = per_sample_gradients(model, loss, batch)
    assert_matches(measured(model, batch).step(), true, 1e-5)


def test_packed_sequences_given_to_the_model_are_refused() -> None:
    model = nn.LSTM(5, 4)
    monitor = gradstats.attach(model)
    packed = pack_sequence([torch.randn(length, 5) for length in (3, 2, 1)])
    model(packed)[0].data.square().mean().backward()
    with pytest.raises(gradstats.NoStatisticsError, match="no rule covers its use in lstm"):
        monitor.step()


def test_a_result_without_samples_is_not_measured() -> None:
    """Every sample has its part in it, and run one by one only the first would be kept."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(6))

        def forward(self, rows: Tensor, order: Tensor) -> Tensor:
            return rows[order.sort().indices.sum() * 0 :] * torch.special.erfcx(self.gain)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.head = Flat(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.flat(x.flatten(0, 1), x[:, 0, 0])
            return self.head(rows.view(x.shape))

    torch.manual_seed(0)
    model, batch = Whole(), torch.randn(4, 3, 6)
    true = per_sample_gradients(model, loss, batch)
    assert_matches(measured(model, batch).step(), true, 1e-5)


def test_lengths_that_must_fall_are_refused_where_positions_may_be_samples() -> None:
    """Where there are as many positions as samples a trial moves one, and this model forbids it."""
    lengths = torch.tensor([5, 5, 4, 3, 2, 1])
    ids = torch.zeros(6, 5, dtype=torch.long)
    ids[-1] = 1  # the sample that differs most, whose length takes the place of the longest
    batch = torch.cat((ids, lengths[:, None]), 1)
    model = Tagger(enforce_sorted=True)
    monitor = gradstats.attach(model)
    with pytest.raises(gradstats.BatchDimError, match=r"fails when.*`lengths`.*samples\(ids="):
        model(batch)
    with monitor.samples(ids=torch.arange(6)):
        loss(model, batch).backward()
    assert monitor.step().num_samples == 6


def test_the_fallback_announces_itself_once_and_works_in_chunks() -> None:
    model = PROBLEMS["one_plus"].make()
    data = PROBLEMS["one_plus"].data(6)
    true = per_sample_gradients(model, loss, data)
    monitor = gradstats.attach(model, moments=True, fallback_bytes=300)
    with pytest.warns(FallbackWarning, match=r"weight: no rule covers its use in add"):
        loss(model, data).backward()
    assert_matches(monitor.step(), true, 1e-5)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model, data).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_the_first_forward_holds_nothing_afterwards() -> None:
    """Its first try ended in the middle, in an exception."""
    model, batch = PROBLEMS["one_plus"].make(), PROBLEMS["one_plus"].data(6)
    first = batch.clone()
    held = weakref.ref(first)
    monitor = measured(model, first)
    monitor.step()
    assert monitor.fallbacks()
    del first
    assert held() is None  # at once: no cycle waits for the collector


def test_compiled_use_without_a_rule_is_reported() -> None:
    torch._dynamo.reset()
    problem = PROBLEMS["one_plus"]
    model, data = problem.make(), problem.data(4)
    monitor = gradstats.attach(model)
    loss(torch.compile(model, backend="aot_eager", fullgraph=True), data).backward()
    stats = monitor.step()
    assert list(stats.coverage.missing) == ["weight"]
    assert "does not run in a compiled forward" in stats.coverage.missing["weight"]


def test_dropout_before_a_fallback_is_drawn_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)
            self.inner = PROBLEMS["one_plus"].make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.drop(self.a(x)))

    model, batch = Model(), torch.randn(6, 6)
    torch.manual_seed(3)
    expected = [model(batch), model(batch)]
    monitor = gradstats.attach(model)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for e in expected:
            torch.testing.assert_close(model(batch), e, rtol=1e-6, atol=1e-6)
    monitor.detach()
