"""Packed sequences given by their offsets, experts that gather and add, and samples that do not count."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from models import loss
from oracle import assert_matches, per_sample_gradients
from token_oracle import IDS, Language, per_token_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradstats


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Norm(nn.Module):
    """A root mean square norm written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.shift = (
            nn.Parameter(torch.rand(width)),
            nn.Parameter(torch.rand(1, 1, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return x + (self.shift if x.dim() == 3 else self.shift[0])


class Packing(nn.Module):
    """Self-attention within each sequence of (rows, …) or (1, rows, …) tokens."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.norm, self.last = Norm(6), nn.LayerNorm(6)
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)
        self.recompute = recompute

    def attend(self, x: Tensor, cuts: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        parts = [(cuts[i], cuts[i + 1]) for i in range(len(cuts) - 1) if cuts[i + 1] > cuts[i]]
        out = [
            F.scaled_dot_product_attention(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :])
            for a, b in parts
        ]
        return torch.cat(out, -2)

    def forward(self, ids: Tensor, cuts: Tensor) -> Tensor:
        at = torch.cat([torch.arange(n) for n in cuts.diff().tolist()]).view(ids.shape)
        x = self.norm(self.tokens(ids) + self.places(at))
        if self.recompute:
            x = x + checkpoint(self.attend, x, cuts, use_reentrant=False)
        else:
            x = x + self.attend(x, cuts)
        return self.head(self.last(x))


CUTS = torch.tensor([0, 3, 4, 4, 9, 11])  # the third sequence is empty
TOKENS = torch.randint(0, 11, (11,), generator=torch.Generator().manual_seed(3))


def _true(model: nn.Module) -> dict[str, Tensor]:
    """Each sequence on its own."""
    wide = copy.deepcopy(model).double()
    found: dict[str, list[Tensor]] = {}
    for a, b in pairwise(CUTS.tolist()):
        wide.zero_grad()
        if b > a:
            wide(TOKENS[a:b], torch.tensor([0, b - a])).sin().sum().backward()
        for name, p in wide.named_parameters():
            found.setdefault(name, []).append(
                torch.zeros_like(p) if p.grad is None else p.grad.clone()
            )
    return {n: torch.stack(g) for n, g in found.items()}


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_sequences_by_their_offsets(leading: bool, recompute: bool) -> None:
    model = Packing()
    true = _true(model)
    model.recompute = recompute
    monitor = gradstats.attach(model, moments=True)
    tokens = TOKENS[None] if leading else TOKENS
    for _ in range(2):
        model.zero_grad()
        with monitor.samples(cu_seqlens=CUTS):
            out = model(tokens, CUTS)
        (out.sin().sum() / 5).backward()
        assert_matches(monitor.step(), true, 1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_say_what_ids_say(dtype: torch.dtype) -> None:
    model = Packing()
    monitor = gradstats.attach(model)
    ids = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 3, 4, 4])
    records = []
    for said in ({"ids": ids}, {"cu_seqlens": CUTS.to(dtype)}):
        model.zero_grad()
        with monitor.samples(**said):
            model(TOKENS, CUTS).sin().sum().backward()
        records.append(monitor.step())
    assert torch.equal(records[0].per_sample_sq_norm, records[1].per_sample_sq_norm)
    assert records[0].per_sample_sq_norm[2] == 0


@pytest.mark.parametrize("cuts", [[1, 3], [0, 3, 2], [], [[0, 3]], [0.0, 3.0]])
def test_offsets_that_cannot_be_are_refused(cuts) -> None:
    monitor = gradstats.attach(nn.Linear(3, 2))
    refused = pytest.raises(
        gradstats.BatchDimError, match=r"cu_seqlens holds where.*\[0, 3, 4, 9\]"
    )
    with refused, monitor.samples(cu_seqlens=torch.tensor(cuts)):
        pass


def test_what_does_not_go_together_is_refused() -> None:
    model = nn.Linear(3, 2)
    with gradstats.attach(model, moments=True) as monitor:
        ids, mask = torch.tensor([0, 1]), torch.tensor([True, False])
        for said, words in (
            ({}, "needs ids=, cu_seqlens= or mask="),
            ({"ids": ids, "cu_seqlens": ids}, "Pass it alone"),
            ({"mask": mask}, r"cannot be used with attach\(moments=True\)"),
        ):
            refused = pytest.raises(gradstats.InvalidArgumentError, match=words)
            with refused, monitor.samples(**said):
                pass
    with gradstats.attach(model, sample="token") as monitor:
        refused = pytest.raises(
            gradstats.InvalidArgumentError, match=r'sample="token" every row is'
        )
        with refused, monitor.samples(ids):
            pass
        floats = pytest.raises(gradstats.BatchDimError, match=r"not torch.float32.*ignore_index")
        with floats, monitor.samples(mask=torch.ones(2)):
            pass


class Experts(nn.Module):
    """Two of three experts for each token: gathered by index_select, weighted, added by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(3)
        )
        self.norm, self.monitor = Norm(6), None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, 1)
        owner = torch.arange(len(x)).repeat_interleave(x.shape[1])
        shares, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mine, which = (chosen == i).nonzero(as_tuple=True)
            taken = rows.index_select(0, mine)
            if self.monitor is None:
                done = expert(taken)
            else:
                with self.monitor.samples(ids=owner[mine]):
                    done = expert(taken)
            out = out.index_add(0, mine, done * shares[mine, which, None])
        return out.view(x.shape)


def test_experts_that_gather_and_add() -> None:
    model, x = Experts(), torch.randn(5, 7, 6)
    true = per_sample_gradients(model, loss, x)
    monitor = gradstats.attach(model, moments=True)
    model.monitor = monitor
    for _ in range(2):
        model.zero_grad()
        loss(model, x).backward()
        assert_matches(monitor.step(), true, 1e-5)


def test_experts_that_say_nothing_are_refused_by_name() -> None:
    model = Experts()
    gradstats.attach(model)
    with pytest.raises(
        gradstats.BatchDimError, match=r"from layer 'experts\.0.*monitor\.samples\(ids"
    ):
        model(torch.randn(5, 7, 6))


# ---- samples that do not count -----------------------------------------------------------------


def _filled(model: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """The mean over the samples that count."""
    each = model(x).square().flatten(1).sum(1)
    return (each * kept).sum() / kept.sum()


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def test_samples_that_fill_up_a_batch_do_not_count() -> None:
    model, x = _model(), torch.randn(6, 4, 6)
    kept = torch.tensor([True, True, False, True, False, True])
    true = per_sample_gradients(model, lambda m, b: m(b).square().sum(), x[kept])
    monitor = gradstats.attach(model)
    with monitor.samples(mask=kept):
        _filled(model, x, kept).backward()
    assert_matches(monitor.step(), true, 1e-5)
    model.zero_grad()
    for part, some in ((x[:4], kept[:4]), (x[4:], kept[4:])):  # and in uneven micro-batches
        with monitor.samples(mask=some):
            (_filled(model, part, some) * some.sum() / kept.sum()).backward()
    assert_matches(monitor.step(), true, 1e-5)
    assert monitor.noise_scale().num_samples == 8


def test_what_is_left_out_must_not_contribute() -> None:
    model, x = _model(), torch.randn(6, 4, 6)
    monitor = gradstats.attach(model)
    with monitor.samples(mask=torch.arange(6) < 5):
        model(x).square().mean().backward()
    missing = monitor.step().coverage.missing
    assert set(missing) == {n for n, _ in model.named_parameters()}
    assert "left out contributed to its gradient" in missing["0.weight"]


def test_a_mask_of_another_size_or_another_block_is_refused() -> None:
    model, x = _model(), torch.randn(6, 6)
    monitor = gradstats.attach(model)
    other = pytest.raises(gradstats.BatchDimError, match="has 5 entries, and the model got 6")
    with other, monitor.samples(mask=torch.arange(5) < 4):
        model(x)
    with monitor.samples(mask=torch.arange(6) < 4):
        first = model(x)[:4].sum()
    (first + model(x).sum()).backward()
    with pytest.raises(gradstats.BatchDimError, match=r"inside and outside of samples\(mask"):
        monitor.step()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inside = pytest.raises(Exception, match="does not reach into a compiled forward")
    with inside, monitor.samples(mask=torch.arange(6) < 4):
        compiled(x)


def test_padding_where_tokens_are_samples() -> None:
    """Padding at the end, masked in attention and in the loss, has no part in any gradient."""
    model = Language()
    lengths = torch.tensor([5, 2, 4])
    labels = torch.where(torch.arange(5) < lengths[:, None], IDS, -100)

    def run(m: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(m(ids).flatten(0, 1), target.flatten())

    every = per_token_gradients(model, IDS, lambda m, ids: run(m, ids, labels))
    inside = (labels != -100).flatten()
    true = {n: g[inside] * 11 / 15 for n, g in every.items()}
    monitor = gradstats.attach(model, sample="token")
    with monitor.samples(mask=labels != -100):
        run(model, IDS, labels).backward()
    stats = monitor.step()
    assert stats.num_samples == 11
    assert_matches(stats, true, 1e-5)
    model.zero_grad()
    prompt = labels.clone()
    prompt[:, 0] = -100  # others attend to the first position, so it has a part
    with monitor.samples(mask=prompt != -100):
        run(model, IDS, prompt).backward()
    missing = monitor.step().coverage.missing
    assert "tokens.weight" in missing
    assert "head.weight" not in missing
    assert "others attend to" in missing["block.qkv.weight"]
