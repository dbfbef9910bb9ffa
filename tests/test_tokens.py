"""attach(sample="token"): every position's part of each gradient, against a pass per position."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import ClassToken, CopiedPositions, Custom, LaidOutPositions, Positions, Recurrent, Tied
from oracle import assert_matches
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradstats


class Block(nn.Module):
    """Causal attention with projections of its own, an MLP, two kinds of normalisation."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.second(x))


class Language(nn.Module):
    def __init__(self, flatten: str = "no", recompute: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 6), nn.Embedding(9, 6)
        self.block, self.head = Block(), nn.Linear(6, 13)
        self.scale = nn.Parameter(torch.rand(6))
        self.flatten, self.recompute = flatten, recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        if self.flatten == "positions first":
            x = x.transpose(0, 1)
        if self.flatten != "no":
            x = x.flatten(0, 1)
        x = self.head(x * self.scale)
        if self.flatten == "positions first":
            return x.view(*ids.t().shape, -1).transpose(0, 1)
        return x.view(*ids.shape, -1)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A mean over tokens that treats no two entries alike."""
    out = model(batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(out[0].shape)
    return ((out - 0.3) * weights).square().sum(-1).mean()


class _OneRow(TorchFunctionMode):
    """Parameters count where they meet the row of one position only; elsewhere they are constants."""

    def __init__(self, keep: Tensor, params: list[Tensor]) -> None:
        super().__init__()
        self.keep, self.known = keep, list(params)

    def _own(self, value: object) -> bool:
        return any(value is p for p in self.known)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        out = func(*args, **kwargs)
        if not any(self._own(a) for a in (*args, *kwargs.values())) or not isinstance(out, Tensor):
            return out
        if out.shape[:2] != self.keep.shape:
            self.known.append(out)  # a view of a parameter, or rows looked up for every sequence
            return out
        args = [a.detach() if self._own(a) else a for a in args]
        kwargs = {k: v.detach() if self._own(v) else v for k, v in kwargs.items()}
        keep = self.keep.view(*self.keep.shape, *(1,) * (out.dim() - 2))
        return torch.where(keep, out, func(*args, **kwargs))


def _attention(query, key, value, width, heads, w_in, b_in, *rest, **options):  # type: ignore[no-untyped-def]
    """Self-attention of (T, B, E), from its definition."""
    assert query is key is value
    w_out, b_out = rest[4], rest[5]
    x = query.transpose(0, 1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2)
               for t in F.linear(x, w_in, b_in).chunk(3, -1))  # fmt: skip
    shares = torch.softmax(q @ k.transpose(-1, -2) / (width // heads) ** 0.5, -1)
    return F.linear((shares @ v).transpose(1, 2).flatten(2), w_out, b_out).transpose(0, 1), None


def per_token_gradients(model: nn.Module, batch: Tensor, run=_loss) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """(B·T, *shape) of each parameter, in units where their mean is the gradient; float64."""
    model = copy.deepcopy(model).double()
    model.recompute = False  # what a checkpoint recomputes runs outside of the mode
    wide = batch.double() if batch.is_floating_point() else batch
    found: dict[str, list[Tensor]] = {}
    count = batch.shape[0] * batch.shape[1]
    for i in range(count):
        keep = torch.zeros(count, dtype=torch.bool)
        keep[i] = True
        model.zero_grad()
        with _OneRow(keep.view(batch.shape[:2]), list(model.parameters())):
            run(model, wide).backward()
        for name, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            found.setdefault(name, []).append(count * grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


IDS = torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


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
    for _ in range(2):
        model.zero_grad()
        _loss(model, batch).backward()
        stats = monitor.step()
        assert_matches(stats, true, 1e-5)
        assert set(stats.grad_var) == set(true)
    assert not monitor.fallbacks()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tied_head_has_its_cross_term(compiled: bool) -> None:
    torch._dynamo.reset()
    model = Tied()
    true = per_token_gradients(model, IDS)
    monitor = gradstats.attach(model, sample="token")
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for _ in range(2):
        model.zero_grad()
        _loss(run, IDS).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_a_tied_head_with_moments_is_not_covered() -> None:
    model = Tied()
    monitor = gradstats.attach(model, sample="token", moments=True)
    _loss(model, IDS).backward()
    missing = monitor.step().coverage.missing
    assert list(missing) == ["tokens.weight"]
    assert "used more than once" in missing["tokens.weight"]


@pytest.mark.parametrize("flatten", ["samples first", "positions first"])
def test_flattened_rows_stay_with_their_position(flatten: str) -> None:
    plain, flat = Language(), Language(flatten)
    flat.load_state_dict(plain.state_dict())
    true = per_token_gradients(plain, IDS)
    monitor = gradstats.attach(flat, sample="token", moments=True)
    for _ in range(2):
        flat.zero_grad()
        _loss(flat, IDS).backward()
        assert_matches(monitor.step(), true, 1e-5)


@pytest.mark.parametrize("name", ["language model", "raw parameters", "heads", "masking"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    make, batch = MODELS[name]
    model = make()
    true = per_token_gradients(model, batch)
    monitor = gradstats.attach(model, sample="token", moments=True)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        _loss(run, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_the_self_check_passes() -> None:
    model = Language()
    with gradstats.attach(model, sample="token", self_check=1) as monitor:
        for _ in range(6):
            model.zero_grad()
            _loss(model, IDS).backward()
            assert monitor.step().coverage.fraction == 1


def test_uneven_micro_batches_of_tokens() -> None:
    model = Language()
    true = per_token_gradients(model, IDS)
    monitor = gradstats.attach(model, sample="token", moments=True)
    for part in IDS.split([2, 1]):
        (_loss(model, part) * len(part) / len(IDS)).backward()
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
        _loss(model, ids).backward()
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
    _loss(model, ROWS).backward()
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
    for _ in range(2):
        model.zero_grad()
        _loss(model, batch).backward()
        assert_matches(monitor.step(), true, 1e-5)


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
        _loss(model, IDS).backward()
        monitor.step()
    assert monitor.noise_scale().num_samples == 3 * IDS.numel()
    assert monitor.recommend().present_batch_size == IDS.numel()
