"""The models that the benchmarks train: small ones for a CPU, standard ones for a GPU.

All of them treat samples independently, own no buffers and use no in-place activation, so that
every peer has a fair chance. `Standard.make(tiny=True)` shrinks a model for smoke runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(inputs: int = 784, hidden: int = 1024, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


class GlobalMean(nn.Module):
    """(B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def cnn(width: int = 32, classes: int = 10) -> nn.Module:
    def block(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, padding=1), nn.GroupNorm(8, o), nn.ReLU()]

    return nn.Sequential(
        *block(3, width, 1), *block(width, 2 * width, 2),
        *block(2 * width, 2 * width, 1), *block(2 * width, 4 * width, 2),
        GlobalMean(), nn.Linear(4 * width, classes),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-LN transformer block."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Decoder-only transformer; positions are looked up without a batch dimension, as in GPT-2.

    `batched_positions` gives each sample its own position ids: the same function, for tools that
    want every input to hold the batch.
    """

    def __init__(
        self, vocab: int = 1024, length: int = 256, dim: int = 256, depth: int = 4, heads: int = 4,
        batched_positions: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.batched_positions = batched_positions

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        if self.batched_positions:
            at = at.repeat(ids.shape[0], 1)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(at))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Image encoder with a class token and a learned position tensor."""

    def __init__(
        self, image: int = 32, patch: int = 4, dim: int = 192, depth: int = 6, heads: int = 3,
        classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        length = (image // patch) ** 2 + 1
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A basic (two 3×3) or bottleneck (1×1, 3×3, 1×1) residual block with GroupNorm."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = width * (4 if bottleneck else 1)
        plan = [(width, 1, 1), (width, 3, stride), (out, 1, 1)] if bottleneck else [
            (width, 3, stride), (width, 3, 1)]  # fmt: skip
        layers: list[nn.Module] = []
        channels = inputs
        for o, kernel, step in plan:
            conv = nn.Conv2d(channels, o, kernel, step, padding=kernel // 2, bias=False)
            layers += [conv, nn.GroupNorm(min(32, o), o), nn.ReLU()]
            channels = o
        self.body = nn.Sequential(*layers[:-1])
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != out:
            project = nn.Conv2d(inputs, out, 1, stride, bias=False)
            self.skip = nn.Sequential(project, nn.GroupNorm(min(32, out), out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet(
    depths: tuple[int, ...] = (2, 2, 2, 2), bottleneck: bool = False, width: int = 64,
    classes: int = 200,
) -> nn.Module:  # fmt: skip
    """ResNet with GroupNorm and the standard stem; the defaults are ResNet-18."""
    stem = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    layers: list[nn.Module] = [stem, nn.GroupNorm(min(32, width), width), nn.ReLU(),
                               nn.MaxPool2d(3, 2, 1)]  # fmt: skip
    channels = width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            stride = 2 if stage and i == 0 else 1
            layers.append(Residual(channels, width << stage, stride, bottleneck))
            channels = (width << stage) * (4 if bottleneck else 1)
    return nn.Sequential(*layers, GlobalMean(), nn.Linear(channels, classes))


class Shared(nn.Module):
    """A linear layer that is called twice: its norms have cross terms, so the fallback measures it."""

    def __init__(self, dim: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(dim, dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))).mean(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Problem:
    """A model with one batch. `loss` is the mean cross entropy over all that is predicted."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, model: nn.Module | Callable[..., Any], part: slice = slice(None)) -> Tensor:
        return mean_cross_entropy(model(self.inputs[part]), self.targets[part])


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


@dataclass(frozen=True)
class Standard:
    """`shape` is a sample's input, of pixels or features; with `vocab`, of token ids to predict."""

    model: Callable[..., nn.Module]
    batch: int
    shape: tuple[int, ...]
    classes: int = 10
    vocab: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    tiny: tuple[tuple[str, Any], ...] = ()
    tiny_shape: tuple[int, ...] = ()

    def make(
        self, *, tiny: bool = False, seed: int = 0, device: str = "cpu", **more: Any
    ) -> Problem:
        """The same model and data for the same seed; `more` are options of the model."""
        torch.manual_seed(seed)
        options = {**dict(self.options), **(dict(self.tiny) if tiny else {}), **more}
        shape = (4 if tiny else self.batch, *(self.tiny_shape if tiny else self.shape))
        model = self.model(**options)
        if self.vocab:
            text = torch.randint(options["vocab"], (shape[0], shape[1] + 1))
            inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        else:
            inputs, targets = torch.randn(shape), torch.randint(self.classes, shape[:1])
        return Problem(model.to(device), inputs.to(device), targets.to(device))


_GPT2 = (("vocab", 50304), ("length", 1024), ("dim", 768), ("depth", 12), ("heads", 12))
_VITB = (
    ("image", 224),
    ("patch", 16),
    ("dim", 768),
    ("depth", 12),
    ("heads", 12),
    ("classes", 1000),
)
_TINY_GPT = (("vocab", 32), ("length", 8), ("dim", 16), ("depth", 1), ("heads", 2))
_TINY_VIT = (("image", 8), ("patch", 4), ("dim", 12), ("depth", 1), ("heads", 3))
_RN50 = (("depths", (3, 4, 6, 3)), ("bottleneck", True), ("classes", 1000))
_TINY_RN = (("depths", (1, 1)), ("width", 8))

MODELS = {
    "mlp": Standard(mlp, 256, (784,), tiny=(("inputs", 12), ("hidden", 16)), tiny_shape=(12,)),
    "cnn": Standard(cnn, 64, (3, 32, 32), tiny=(("width", 8),), tiny_shape=(3, 8, 8)),
    "gpt": Standard(GPT, 8, (256,), vocab=1024, options=(("vocab", 1024),), tiny=_TINY_GPT,
                    tiny_shape=(8,)),
    "resnet": Standard(resnet, 32, (3, 64, 64), 200, tiny=_TINY_RN, tiny_shape=(3, 16, 16)),
    "vit": Standard(ViT, 32, (3, 32, 32), tiny=_TINY_VIT, tiny_shape=(3, 8, 8)),
    "shared": Standard(Shared, 64, (32, 256), tiny=(("dim", 8),), tiny_shape=(4, 8)),
    "gpt2-124m": Standard(GPT, 16, (1024,), vocab=50304, options=_GPT2, tiny=_TINY_GPT,
                          tiny_shape=(8,)),
    "resnet-50": Standard(resnet, 64, (3, 224, 224), 1000, options=_RN50, tiny=_TINY_RN,
                          tiny_shape=(3, 16, 16)),
    "vit-b16": Standard(ViT, 64, (3, 224, 224), 1000, options=_VITB, tiny=_TINY_VIT,
                        tiny_shape=(3, 8, 8)),
}  # fmt: skip
