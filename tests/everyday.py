"""Everyday situations: a model, its batch, and how it is trained on it. Measured by test_everyday.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from layers import Tied, Twice
from models import loss
from oracle import per_sample_gradients
from test_shared import Checkpointed, Loop
from test_where_samples_are import Experts, Flattening
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradstats import tracing

CHECKPOINTS = hasattr(torch._dynamo.config, tracing.CHECKPOINTS)  # the compiler takes them
S, Linear, Tanh = nn.Sequential, nn.Linear, nn.Tanh
Loss = Callable[[nn.Module, Tensor], Tensor]


# ---- models ------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen layer and two trained ones of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = Linear(6, 6), Linear(6, 2, bias=False)
        self.up = Linear(2, 6, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + 2.0 * self.up(self.down(x)))


class Bags(nn.Module):
    """Bags of equal length with repeated ids: sum with weights, mean with padding, maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.EmbeddingBag(13, 6, mode="sum")
        self.mean = nn.EmbeddingBag(13, 6, mode="mean", padding_idx=2)
        self.max = nn.EmbeddingBag(13, 6, mode="max")

    def forward(self, ids: Tensor) -> Tensor:
        weights = (0.5 + ids / 13).to(self.sum.weight.dtype)
        return self.sum(ids, per_sample_weights=weights) + self.mean(ids) * self.max(ids)


class Gathering(nn.Module):
    """Two experts take the tokens of each sample that score highest, and add to their places."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Linear(6, 2, bias=False)
        self.experts = nn.ModuleList(S(Linear(6, 6), Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        out = x
        for i, expert in enumerate(self.experts):
            share, at = scores[..., i].topk(3, 1)
            at = at.unsqueeze(-1).expand(-1, -1, 6)
            out = out.scatter_add(1, at, expert(x.gather(1, at)) * share.unsqueeze(-1))
        return out


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.head, self.reentrant = Linear(6, 6), Linear(6, 3), reentrant
        self.inner = S(Linear(6, 8), Tanh(), Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def without_parts() -> nn.Module:
    """Norms that lack a bias, or have no parameter at all."""
    return S(Linear(6, 6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6, elementwise_affine=False),
             nn.GroupNorm(1, 7, affine=False), nn.InstanceNorm1d(7), nn.RMSNorm(6))  # fmt: skip


def half_frozen(*parts: str) -> nn.Module:
    model = two()
    for name in parts:
        model.get_parameter(name).requires_grad_(False)
    return model


def two() -> nn.Module:
    return S(Linear(6, 6), Tanh(), Linear(6, 3))


def looked_up(**options: Any) -> nn.Module:
    return S(nn.Embedding(13, 6, **options), Linear(6, 3))


def told_experts() -> nn.Module:
    return Experts(recompute=False)


# ---- data and losses ---------------------------------------------------------------------------


def sequence(n: int) -> Tensor:
    return torch.randn(n, 7, 6)


def ids(n: int) -> Tensor:
    return torch.randint(0, 13, (n, 7))


def padded(n: int) -> Tensor:
    """Sequences of several lengths, -1 after their end."""
    return torch.where(torch.arange(7) < torch.randint(1, 8, (n, 1)), ids(n), -1)


def close(n: int) -> Tensor:
    """Positions that differ little."""
    return torch.randn(n, 1, 64) + torch.randn(n, 16, 64) / 16


def alternating(model: nn.Module, x: Tensor) -> Tensor:
    """Of each sample's gradient, next to nothing is left."""
    signs = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat(x.shape[1] // 2)[:, None]
    return (model(x) * signs).sum() / len(x)


def plain_sum(model: nn.Module, x: Tensor) -> Tensor:
    """Its gradient has stride 0 everywhere."""
    return model(x).sum() / len(x)


def large(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum() * 400 / len(x)


def second(model: nn.Module, x: Tensor) -> Tensor:
    """The model takes its samples in the second dimension."""
    return model(x.transpose(0, 1)).sin().sum((0, 2)).mean()


def packed(model: nn.Module, rows: Tensor) -> Tensor:
    """The model sees the tokens of all sequences in a row."""
    return model(rows[rows >= 0]).sin().sum() / len(rows)


def labels(rows: Tensor) -> Tensor:
    return torch.where(rows < 5, -100, rows % 3)


def token_mean(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows).flatten(0, 1), labels(rows).flatten())


def token_share(model: nn.Module, one: Tensor, batch: Tensor) -> Tensor:
    out, y = model(one).flatten(0, 1), labels(one).flatten()
    total = (labels(batch) >= 0).sum()
    return F.cross_entropy(out, y, reduction="sum") * len(batch) / total


@dataclass(frozen=True)
class Situation:
    make: Callable[[], nn.Module]
    data: Callable[[int], Tensor] = sequence
    batch: int = 5
    loss: Loss = loss
    share: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None  # of one, in a batch
    batch_dim: int = 0
    rows: Callable[[Tensor], Tensor] | None = None  # whose each row is, said around the forward
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    compiles: bool = True

    def true(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        if self.share is None:
            return per_sample_gradients(model, self.loss, batch)
        share = self.share
        return per_sample_gradients(model, lambda m, one: share(m, one, batch), batch)


SITUATIONS = {
    "five dimensions": Situation(two, lambda n: torch.randn(n, 2, 3, 2, 6)),
    "norms without bias or parameters": Situation(without_parts),
    "one id per sample": Situation(looked_up, lambda n: torch.randint(0, 13, (n,))),
    "bags with repeated ids": Situation(Bags, ids),
    "a module twice": Situation(Twice),
    "a weight again through F.linear": Situation(Loop),
    "tied embedding and head": Situation(Tied, ids),
    "lora": Situation(LowRank),
    "frozen weight, frozen bias": Situation(lambda: half_frozen("0.weight", "2.bias")),
    "frozen bias, frozen weight": Situation(lambda: half_frozen("0.bias", "2.weight")),
    "flattened rows": Situation(
        lambda: Flattening(True), lambda n: torch.randint(0, 11, (n, 7)),
        rows=lambda x: torch.arange(x.numel()) // x.shape[1],
    ),
    "sequence first": Situation(two, batch_dim=1, loss=second),
    "sequence first, as many positions": Situation(two, batch=7, batch_dim=1, loss=second),
    "sequence first, norms": Situation(
        lambda: S(Linear(6, 6), nn.LayerNorm(6), Linear(6, 6), nn.RMSNorm(6)), batch_dim=1, loss=second
    ),
    "packed sequences": Situation(
        looked_up, padded, loss=packed, rows=lambda x: (x >= 0).nonzero()[:, 0]
    ),
    "tokens gathered within a sample": Situation(Gathering),
    "tokens gathered by expert": Situation(told_experts, compiles=False),  # data-dependent sizes
    "checkpoint": Situation(lambda: Recomputed(False), compiles=CHECKPOINTS),
    "reentrant checkpoint": Situation(lambda: Recomputed(True), compiles=CHECKPOINTS),
    "a module twice, once in a checkpoint": Situation(Checkpointed, compiles=False),
    "mean over tokens, some ignored": Situation(looked_up, ids, loss=token_mean, share=token_share),
    "batch of one": Situation(two, batch=1),
    "gradient of stride 0": Situation(two, loss=plain_sum),
    "input of any strides": Situation(two, lambda n: torch.randn(6, n, 7).permute(1, 2, 0)),
    "channels last": Situation(
        lambda: S(nn.Conv2d(3, 4, 3, padding=1), Tanh(), nn.Conv2d(4, 4, 2, groups=4)),
        lambda n: torch.randn(n, 3, 6, 5).contiguous(memory_format=torch.channels_last),
    ),
    "bfloat16 autocast of float32": Situation(
        two, context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=3e-2
    ),
    "float16, squares above 65504": Situation(
        two, loss=large, dtype=torch.float16, tolerance=3e-2
    ),
    "bfloat16, positions that cancel": Situation(
        lambda: Linear(64, 4), close, loss=alternating, dtype=torch.bfloat16, tolerance=3e-2
    ),
}  # fmt: skip
