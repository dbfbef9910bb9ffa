"""attach(sample="token"): every position's part of each gradient, against a pass per position."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import ClassToken, CopiedPositions, Custom, LaidOutPositions, Positions, Recurrent, Tied
from oracle import assert_matches
from token_oracle import IDS, ROWS, Block, Language, per_token_gradients, token_loss
from torch import Tensor, nn

import gradstats


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def two_steps_match(monitor, model, batch, true, run=None):
    """Steps of the model (or of `run`, what was compiled of it); the last one's record."""
    for _ in range(2):
        model.zero_grad()
        token_loss(model if run is None else run, batch).backward()
        stats = monitor.step()
        assert_matches(stats, true, 1e-5)
    return stats


class Masking(nn.Module):
    """A learned token in the place of hidden ones, a table of positions, a slice of another."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.table = (
            nn.Parameter(torch.randn(1, 1, 6)),
            nn.Parameter(torch.randn(1, 5, 6)),
        )
        self.long, self.head = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x[..., :1] > 0.5).expand_as(x)
        x = torch.where(hidden, self.token.expand(*x.shape[:2], -1), x) * self.table
        return self.head(torch.tanh(x + self.long[2 : 2 + x.shape[1]]))


class Heads(nn.Module):
    """Inner dimensions: a norm and a weight over each head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.RMSNorm(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.norm(x.view(*x.shape[:2], 2, 3)))).flatten(2)


def _attending() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)


MODELS = {
    "language model": (Language, IDS),
    "checkpointing": (lambda: Language(recompute=True), IDS),
    "raw parameters": (Custom, ROWS),
    "positions": (Positions, IDS),
    "one row of positions": (lambda: Positions(one_row=True), IDS),
    "positions laid out": (LaidOutPositions, IDS),
    "positions copied": (CopiedPositions, IDS),
    "masking": (Masking, ROWS),
    "heads": (Heads, ROWS),
    "nn.TransformerEncoderLayer": (_attending, ROWS),
    "one sequence": (Language, IDS[:1]),
    "one position": (Language, IDS[:, :1]),
    "as many sequences as positions": (Language, IDS[:, :3]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_position_is_a_sample(name: str) -> None:
    make, batch = MODELS[name]
    model = make()
    true = per_token_gradients(model, batch)
    monitor = gradstats.attach(model, sample="token", moments=True)
    stats = two_steps_match(monitor, model, batch, true)
    assert set(stats.grad_var) == set(true)
    assert not monitor.fallbacks()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tied_head_has_its_cross_term(compiled: bool) -> None:
    torch._dynamo.reset()
    model = Tied()
    true = per_token_gradients(model, IDS)
    monitor = gradstats.attach(model, sample="token")
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    two_steps_match(monitor, model, IDS, true, run=run)


def test_a_tied_head_with_moments_is_not_covered() -> None:
    model = Tied()
    monitor = gradstats.attach(model, sample="token", moments=True)
    token_loss(model, IDS).backward()
    missing = monitor.step().coverage.missing
    assert list(missing) == ["tokens.weight"]
    assert "used more than once" in missing["tokens.weight"]


@pytest.mark.parametrize("flatten", ["samples first", "positions first"])
def test_flattened_rows_stay_with_their_position(flatten: str) -> None:
    plain, flat = Language(), Language(flatten)
    flat.load_state_dict(plain.state_dict())
    true = per_token_gradients(plain, IDS)
    monitor = gradstats.attach(flat, sample="token", moments=True)
    two_steps_match(monitor, flat, IDS, true)


@pytest.mark.parametrize("name", ["language model", "raw parameters", "heads", "masking"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    make, batch = MODELS[name]
    model = make()
    true = per_token_gradients(model, batch)
    monitor = gradstats.attach(model, sample="token", moments=True)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    two_steps_match(monitor, model, batch, true, run=run)


def test_the_self_check_passes() -> None:
    model = Language()
    with gradstats.attach(model, sample="token", self_check=1) as monitor:
        for _ in range(6):
            model.zero_grad()
            token_loss(model, IDS).backward()
            assert monitor.step().coverage.fraction == 1


def test_uneven_micro_batches_of_tokens() -> None:
    model = Language()
    true = per_token_gradients(model, IDS)
    monitor = gradstats.attach(model, sample="token", moments=True)
    for part in IDS.split([2, 1]):
        (token_loss(model, part) * len(part) / len(IDS)).backward()
    assert_matches(monitor.step(), true, 1e-5)


class Random(nn.Module):
    """As HF's GPT-2 has it: products of flattened rows, among layers that see (batch, positions, …)."""

    def __init__(self, width: int, words: int, way: str) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, width), nn.Embedding(9, width)
        self.block, self.head = Block(width), nn.Linear(width, words)
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, width)),
            nn.Parameter(torch.ones(width)),
        )
        self.way = way

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        x = x.transpose(0, 1) if self.way == "positions first" else x
        if self.way == "as it is":
            x = torch.tanh(x @ self.weight + self.bias)
        else:
            rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
            x = torch.tanh(rows).view(x.shape)
        return self.head(x.transpose(0, 1) if self.way == "positions first" else x)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(low, 6) for low in (1, 1, 3, 3))),
    way=st.sampled_from(["as it is", "samples first", "positions first"]),
    seed=st.integers(0, 1000),
)
def test_random_language_models(sizes: tuple[int, ...], way: str, seed: int) -> None:
    """Sizes that coincide are the difficulty: what cannot be told apart is not covered, never wrong."""
    batch, length, width, words = sizes
    assume(batch != length or width != length)  # the oracle takes tables for rows there
    torch.manual_seed(seed)
    plain, model = Random(width, words, "as it is"), Random(width, words, way)
    model.load_state_dict(plain.state_dict())
    plain, model = plain.double(), model.double()
    ids = torch.randint(1, words, (batch, length))
    ids[0] = 0  # a sample unlike the others, which shows where its rows are
    true = per_token_gradients(plain, ids)
    with gradstats.attach(model, sample="token", moments=True) as monitor:
        token_loss(model, ids).backward()
        assert_matches(monitor.step(), true, 1e-9)


class Pooled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 4), inner, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Turned(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@pytest.mark.parametrize(
    ("inner", "missing", "why"),
    [
        (Mean, ["last.weight", "last.bias"], r"layer 'last' got an input of shape \(3, 4\), not a row"),
        (lambda: Turned(nn.Conv1d(4, 4, 1)), ["inner.inner.weight", "inner.inner.bias"],
         "conv1d does not give every position a part"),
        (lambda: Turned(nn.Linear(5, 5)), ["inner.inner.weight", "inner.inner.bias"],
         r"layer 'inner.inner' got an input of shape \(3, 4, 5\)"),
        (lambda: nn.Sequential(nn.LayerNorm((5, 4))), ["inner.0.weight", "inner.0.bias"],
         "no rule covers its use in layer_norm"),
    ],
)  # fmt: skip
def test_what_mixes_positions_is_not_covered(inner, missing: list[str], why: str) -> None:
    model = Pooled(inner())
    plain = copy.deepcopy(model)
    monitor = gradstats.attach(model, sample="token")
    for m in (plain, model):
        m(ROWS).square().sum().backward()
    coverage = monitor.step().coverage
    assert sorted(coverage.missing) == sorted(missing)
    assert all(re.search(why, text) for text in coverage.missing.values()), coverage.missing
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_class_token_makes_other_positions() -> None:
    model = nn.Sequential(nn.Linear(6, 6), ClassToken())
    monitor = gradstats.attach(model, sample="token")
    token_loss(model, ROWS).backward()
    missing = monitor.step().coverage.missing
    assert set(missing) == {"1.token", "1.last", "1.head.weight", "1.head.bias"}
    assert "(3, 8, 6), not a row for each of the 5 positions of 3 seq" in missing["1.head.weight"]


def test_recurrent_layers_are_not_covered() -> None:
    model = Recurrent()
    monitor = gradstats.attach(model, sample="token")
    model.inner(ROWS)[0].sum().backward()
    with pytest.raises(
        gradstats.NoStatisticsError, match=r"nothing that was measured.*lstm does not give"
    ):
        monitor.step()
    model = nn.Sequential(nn.Linear(6, 6), Recurrent())
    monitor = gradstats.attach(model, sample="token")
    model(ROWS[:, :4]).sum().backward()
    coverage = monitor.step().coverage
    assert set(coverage.measured) == {"0.weight", "0.bias", "1.head.weight", "1.head.bias"}


@pytest.mark.parametrize("sequences", [1, 3])
def test_as_many_features_as_positions(sequences: int) -> None:
    model, batch = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Block(5)), ROWS[:sequences]
    true = per_token_gradients(model, batch)
    monitor = gradstats.attach(model, sample="token", moments=True)
    two_steps_match(monitor, model, batch, true)


class Table(nn.Module):
    """Serves sequences of five positions only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@pytest.mark.parametrize(
    "inner", [lambda: Turned(nn.Linear(5, 5)), lambda: nn.Sequential(Table(), nn.Linear(5, 5))]
)
def test_as_many_features_as_positions_are_not_guessed(inner) -> None:
    model = nn.Sequential(nn.Linear(6, 5), inner())
    monitor = gradstats.attach(model, sample="token")
    model(ROWS).square().sum().backward()
    coverage = monitor.step().coverage
    assert set(coverage.measured) == {"0.weight", "0.bias"}
    for text in coverage.missing.values():
        assert "(3, 5, 5), which has another dimension as long as its 5 positions" in text
        assert "measure with sequences of another length" in text


def test_positions_turned_inside_are_refused_where_shapes_cannot_tell() -> None:
    class Exchanged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).transpose(0, 1)).transpose(0, 1)

    model = Exchanged()
    gradstats.attach(model, sample="token")
    with pytest.raises(gradstats.UnsupportedLayerError, match="samples influence each other"):
        model(ROWS[:, :3])


def test_arguments() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(gradstats.InvalidArgumentError, match="sample='word' is not known here"):
        gradstats.attach(model, sample="word")
    with pytest.raises(gradstats.InvalidArgumentError, match="batch_dim=1 cannot be used with"):
        gradstats.attach(model, sample="token", batch_dim=1)
    monitor = gradstats.attach(model, sample="token")
    with pytest.raises(
        gradstats.BatchDimError, match=r"without \(batch, positions\) ids.*\"example\""
    ):
        model(torch.randn(4, 6))
    state = monitor.state_dict()
    monitor.detach()
    other = gradstats.attach(model)
    with pytest.raises(
        gradstats.InvalidArgumentError, match=r"sample='token'.*not sample='example'"
    ):
        other.load_state_dict(state)


def test_the_noise_scale_counts_in_tokens() -> None:
    model = Language()
    monitor = gradstats.attach(model, sample="token")
    for _ in range(3):
        model.zero_grad()
        token_loss(model, IDS).backward()
        monitor.step()
    assert monitor.noise_scale().num_samples == 3 * IDS.numel()
    assert monitor.recommend().present_batch_size == IDS.numel()
