"""Where the samples are in what a layer sees: found from the shapes, or refused."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from layers import Positions
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats.fallback import FallbackWarning


def test_samples_in_the_second_dimension() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm = nn.Embedding(13, 6), nn.LayerNorm(6)
            self.positions, self.head = nn.Parameter(torch.randn(7, 1, 6)), nn.Linear(6, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.tokens(ids) + self.positions))

    def swapped(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return m(ids.t()).square().sum((0, 2)).mean()

    model, ids = SequenceFirst(), torch.randint(0, 13, (5, 7))
    true = per_sample_gradients(model, swapped, ids)
    monitor = gradstats.attach(model, batch_dim=1, moments=True)
    swapped(model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_positions_given_as_long_as_the_batch_are_not_guessed() -> None:
    class Given(Positions):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            at = (ids[0] * 0).cumsum(0)  # made from the input, one entry per position
            return self.head(torch.tanh(self.tokens(ids) + self.positions(at)))

    model, ids = Given(), torch.randint(0, 13, (7, 7))
    gradstats.attach(model)
    with pytest.raises(gradstats.UnsupportedLayerError, match="one id per sample or one per"):
        model(ids)


@pytest.mark.parametrize("compiled", ["nothing", "whole", "part"])
def test_positions_of_which_no_input_tells(compiled: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(len(x), -1, 2, 6).mean(2)  # 4 positions and 4 samples from here on
            return self.head(torch.tanh(x + self.positions(torch.arange(x.shape[1]))))

    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(6, 6), Pooled()), torch.randn(4, 8, 6)
    true = per_sample_gradients(model, loss, x)
    monitor = gradstats.attach(model, moments=True)
    if compiled == "part":
        model[1].compile(backend="aot_eager", fullgraph=True)
    elif compiled == "whole":
        model.compile(backend="aot_eager", fullgraph=True)
    loss(model, x).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_class_labels_one_per_sample() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.labels, self.head = nn.Embedding(13, 6), nn.Linear(6, 3)

        def forward(self, labels: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.labels(labels)))

    model, labels = Labelled(), torch.randint(0, 13, (6,))
    true = per_sample_gradients(model, loss, labels)
    monitor = gradstats.attach(model, moments=True)
    loss(model, labels).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_cross_entropy_of_a_language_model() -> None:
    def next_token(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        out = m(ids)
        return F.cross_entropy(out.flatten(0, 1), (ids % 4).flatten())

    model, ids = Positions(), torch.randint(0, 13, (5, 7))
    true = per_sample_gradients(model, next_token, ids)
    monitor = gradstats.attach(model, moments=True)
    next_token(model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)


class Flattening(nn.Module):
    """(B, T) ids; everything after the embedding sees (B·T, D), as in many hand-written models."""

    def __init__(self, flatten: bool, sequence_first: bool = False) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6))
        self.flatten, self.sequence_first = flatten, sequence_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.flatten:
            x = (x.transpose(0, 1) if self.sequence_first else x).reshape(-1, 6)
        x = self.head(torch.tanh(self.inner(self.norm(x)) * self.scale))
        if not self.flatten:
            return x
        if self.sequence_first:
            return x.view(ids.shape[1], ids.shape[0], 3).transpose(0, 1)
        return x.view(*ids.shape, 3)


@pytest.mark.parametrize("sequence_first", [False, True])
def test_flattened_inside_the_model_with_sample_ids(sequence_first: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (4, 5))
    plain, flat = Flattening(False), Flattening(True, sequence_first)
    flat.load_state_dict(plain.state_dict())
    true = per_sample_gradients(plain, loss, ids)
    monitor = gradstats.attach(flat, moments=True)
    rows = torch.arange(4)
    rows = rows.repeat(5) if sequence_first else rows.repeat_interleave(5)
    with monitor.samples(rows):
        loss(flat, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)
    loss(plain, ids).backward()
    for p, q in zip(flat.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reorder", [False, True])
def test_packed_sequences_with_sample_ids(reorder: bool) -> None:
    """Sequences of several lengths one after the other, without padding, or their tokens mixed."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, 6), nn.RMSNorm(6), nn.Linear(6, 6), nn.Tanh(),
                          nn.Linear(6, 3))  # fmt: skip
    lengths = torch.tensor([3, 1, 5, 2])
    sample = torch.repeat_interleave(torch.arange(4), lengths)
    tokens = torch.randint(0, 11, (11,))
    if reorder:
        order = torch.randperm(11)
        sample, tokens = sample[order], tokens[order]

    true: dict[str, list[Tensor]] = {}
    wide = copy.deepcopy(model).double()
    for i in range(4):
        wide.zero_grad()
        wide(tokens[sample == i]).sin().sum().backward()
        for name, p in wide.named_parameters():
            true.setdefault(name, []).append(p.grad.clone())
    monitor = gradstats.attach(model, moments=True)
    with monitor.samples(sample):
        (model(tokens).sin().sum() / 4).backward()
    assert_matches(monitor.step(), {n: torch.stack(g) for n, g in true.items()}, 1e-5)


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("ids_shape", [(4, 5), (5, 5), (2, 6)])
def test_flattened_inside_the_model_is_found_out(sequence_first: bool, ids_shape) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, ids_shape)
    plain, flat = Flattening(False), Flattening(True, sequence_first)
    flat.load_state_dict(plain.state_dict())
    true = per_sample_gradients(plain, loss, ids)
    monitor = gradstats.attach(flat, moments=True)
    for _ in range(2):
        flat.zero_grad()
        loss(flat, ids).backward()
        assert_matches(monitor.step(), true, 1e-5)


class FlatBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.product(x.flatten(0, 1))).view_as(x)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 4)])  # one sample needs no looking
def test_flattened_inside_a_checkpoint(sizes) -> None:
    torch.manual_seed(0)

    class Recomputes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(5, 6), FlatBlock()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.first(x), use_reentrant=False)

    model = Recomputes()
    plain = copy.deepcopy(model)
    monitor = gradstats.attach(model)
    for size in sizes:
        model.zero_grad()
        x = torch.randn(size, 3, 5)
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
def test_flattened_rows_of_a_micro_batch_of_one(sizes) -> None:
    torch.manual_seed(0)
    model, ids = Flattening(True), torch.randint(0, 11, (4, 5))
    true = per_sample_gradients(model, loss, ids)
    monitor = gradstats.attach(model, moments=True)
    for part in ids.split(sizes):
        (loss(model, part) * len(part) / 4).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_flattened_is_found_out_where_the_first_samples_are_equal() -> None:
    torch.manual_seed(0)
    model, ids = Flattening(True), torch.randint(0, 11, (4, 5))
    ids[1] = ids[0]
    true = per_sample_gradients(model, loss, ids)
    monitor = gradstats.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        loss(model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_looking_for_the_samples_leaves_random_numbers_and_buffers_alone() -> None:
    class Counting(Flattening):
        def __init__(self) -> None:
            super().__init__(True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(super().forward(ids))

    torch.manual_seed(0)
    model, ids = Counting(), torch.randint(0, 11, (4, 5))
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    want = plain(ids)
    after = torch.rand(())
    gradstats.attach(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(ids), want)
    assert torch.equal(torch.rand(()), after)
    assert model.calls == 1


@pytest.mark.parametrize("way", ["sorted", "mixed"])
def test_rows_in_no_order_are_refused_with_the_way_out(way: str) -> None:
    class Reordering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids).flatten(0, 1)
            if way == "sorted":  # as a mixture of experts sends tokens where they belong
                return self.head(x[torch.randperm(len(x))])
            return self.head(x - x.mean(0))

    model = Reordering()
    gradstats.attach(model)
    with pytest.raises(
        gradstats.BatchDimError, match=r"layer 'head' got 20 rows of 4 samples.*ids"
    ):
        model(torch.arange(20).view(4, 5) % 11)


def test_sample_ids_that_cannot_be_are_refused() -> None:
    model = nn.Linear(3, 2)
    monitor = gradstats.attach(model)
    negative = pytest.raises(gradstats.BatchDimError, match="from -1 to 1 do not fit 2 samples")
    with negative, monitor.samples(torch.tensor([0, 1, -1])):
        pass
    floats = pytest.raises(gradstats.BatchDimError, match=r"one whole number for each row.*float32")
    with floats, monitor.samples(torch.ones(3), num_samples=2):
        pass


class Experts(nn.Module):
    """Tokens go to one of three experts, by a linear router; each is told whose its tokens are."""

    told = staticmethod(lambda ids: contextlib.nullcontext())

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.first, self.recompute = nn.Linear(6, 6), recompute
        self.experts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(3)
        )

    def expert(self, i: int, rows: Tensor, ids: Tensor) -> Tensor:
        with self.told(ids):
            return self.experts[i](rows)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.first(x)).flatten(0, 1)
        ids = torch.arange(len(x)).repeat_interleave(x.shape[1])
        chosen = (x.flatten(0, 1)[:, 0] > 0).long()  # none goes to the last
        out = torch.zeros_like(rows)
        for i in range(3):
            mine = chosen == i
            args = (i, rows[mine], ids[mine])
            run = self.expert
            done = checkpoint(run, *args, use_reentrant=False) if self.recompute else run(*args)
            out = out.index_put((mine.nonzero()[:, 0],), done)
        return out.view(x.shape)


@pytest.mark.parametrize("recompute", [False, True])
def test_sample_ids_within_the_forward_for_each_expert(recompute: bool) -> None:
    torch.manual_seed(0)
    model, x = Experts(recompute), torch.randn(5, 7, 6)
    x[3, :, 0] = -1  # all of a sample's tokens go to one expert
    true = per_sample_gradients(model, loss, x)
    monitor = gradstats.attach(model, moments=True)
    model.told = monitor.samples
    for _ in range(2):
        model.zero_grad()
        loss(model, x).backward()
        assert_matches(monitor.step(), true, 1e-5)
    other = pytest.raises(gradstats.BatchDimError, match=r"num_samples=4\) within a forward of 5")
    model.told = lambda ids: monitor.samples(ids % 4, num_samples=4)
    with other:
        model(x)


class InSequence(nn.Module):
    """The first dimension is time: what comes later depends on what came before."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.cell(x) if isinstance(self.cell, nn.RNN) else self.cell(x, x, x)
        return self.head(out[0])


@pytest.mark.parametrize("make", [lambda: nn.RNN(6, 6), lambda: nn.MultiheadAttention(6, 2)])
def test_sequence_first_with_as_many_positions_as_samples(make) -> None:
    torch.manual_seed(0)
    model, x = InSequence(make()), torch.randn(5, 5, 6)
    gradstats.attach(model)
    with pytest.raises(
        gradstats.UnsupportedLayerError, match=r"layer 'head'.*influence.*batch_dim"
    ):
        model(x)

    def second(m: nn.Module, x: Tensor) -> Tensor:
        return m(x.transpose(0, 1)).sin().sum((0, 2)).mean()

    told = copy.deepcopy(model)
    true = per_sample_gradients(told, second, x)
    monitor = gradstats.attach(told, batch_dim=1)
    second(told, x).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_a_transposed_inside_with_as_many_positions_as_samples() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).transpose(0, 1)).transpose(0, 1)

    gradstats.attach(model := Turned())
    with pytest.raises(gradstats.UnsupportedLayerError, match=r"layer 'b': samples influence"):
        model(torch.randn(5, 5, 6))


def test_flattened_is_found_out_where_samples_begin_alike() -> None:
    """Of samples 0 and 1 only the last rows differ; row 3 of 12 alone could be of either layout."""
    torch.manual_seed(0)
    model, ids = Flattening(True), torch.tensor([[1, 2, 1, 3], [1, 2, 1, 4], [5, 6, 5, 7]])
    true = per_sample_gradients(model, loss, ids)
    monitor = gradstats.attach(model)
    loss(model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)
