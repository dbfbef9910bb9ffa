"""Small models, one per situation that the rules and the fallback must get exactly right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Positions(nn.Module):
    """Token embedding plus a position embedding that has no batch dimension, as in GPT-2."""

    def __init__(self, one_row: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 6, padding_idx=3), nn.Embedding(9, 6)
        self.head = nn.Linear(6, 4, bias=False)
        self.one_row = one_row

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        at = at.unsqueeze(0) if self.one_row else at
        return self.head(torch.tanh(self.tokens(ids) + self.positions(at)))


class RepeatedPositions(Positions):
    """The same position is looked up twice by a sample."""

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1]) // 2
        return self.head(torch.tanh(self.tokens(ids) + self.positions(at)[None]))


class Custom(nn.Module):
    """Raw parameters: a custom RMSNorm, a scale, a position tensor and a slice of it, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 9, 6))
        self.gain = nn.Parameter(torch.randn(()))
        self.mix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions[:, : x.shape[1]]
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        x = torch.tanh(x - self.shift) * self.gain
        return x @ self.mix


class ClassToken(nn.Module):
    """A learned token before the sequence, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 3)
        self.last = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.token.expand(len(x), -1, -1), self.last.expand_as(x[:, :2])
        mixed = torch.cat([first, x, last], 1) + x.mean(1, keepdim=True)
        return self.head(torch.tanh(mixed))


class Functional(nn.Module):
    """Weights used through functions: F.linear, a transposed view, addmm, a product from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.c, self.d = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(3))
        self.e, self.left = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.a, self.b))
        x = torch.tanh(x @ self.c.t())
        x = torch.tanh(self.left @ x)
        return torch.addmm(self.d, x.sum(1), self.e)


class Twice(nn.Module):
    """One module called twice: its norms have cross terms."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(13, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.tokens(ids))))


class ScaledByOnePlus(nn.Module):
    """(1 + weight), as Gemma's RMSNorm has it: no rule, so the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * (1 + self.weight))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


class BilinearModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Bilinear(6, 6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x, torch.tanh(x)))


class FrozenParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)
        self.c.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.shift
        return self.b(F.relu(y, inplace=True))


def eval_batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def _images(*size: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, 3, *size)


def _sequence(n: int) -> Tensor:
    return torch.randn(n, 7, 6)


def _ids(n: int) -> Tensor:
    return torch.randint(0, 13, (n, 7))


@dataclass(frozen=True)
class Problem:
    make: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    ruled: bool = True  # served by rules alone, so also under torch.compile(fullgraph=True)
    batch: int = 5


S = nn.Sequential
PROBLEMS = {
    "mlp": Problem(lambda: S(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
                   lambda n: torch.randn(n, 6)),
    "sequence": Problem(lambda: S(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3, bias=False)), _sequence),
    "four_dimensions": Problem(lambda: S(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)),
                               lambda n: torch.randn(n, 3, 2, 6)),
    "layer_norm": Problem(lambda: S(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)), _sequence),
    "layer_norm_wide": Problem(lambda: S(nn.LayerNorm((7, 6)), nn.Tanh(), nn.LayerNorm(6, bias=False),
                                         nn.LayerNorm(6, elementwise_affine=False)), _sequence),
    "rms_norm": Problem(lambda: S(nn.RMSNorm(6), nn.Linear(6, 6), nn.RMSNorm((7, 6)), nn.Tanh()),
                        _sequence),
    "group_norm": Problem(lambda: S(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Tanh(), nn.Flatten(),
                                    nn.Linear(8 * 9, 4)), _images(5, 5)),
    "group_norm_vectors": Problem(lambda: S(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh()),
                                  lambda n: torch.randn(n, 6)),
    "instance_norm": Problem(lambda: S(nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 2, 2)),
                             _images(4, 5)),
    "eval_batch_norm": Problem(eval_batch_norm, _images(6, 6)),
    "conv1d": Problem(lambda: S(nn.Conv1d(3, 4, 3, padding=2), nn.Tanh(), nn.Conv1d(4, 2, 2, stride=2)),
                      _images(9)),
    "conv2d": Problem(lambda: S(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, (2, 3), (2, 1))),
                      _images(6, 7)),
    "conv2d_same": Problem(lambda: S(nn.Conv2d(3, 4, (2, 3), padding="same"), nn.Tanh(),
                                 nn.Conv2d(4, 2, 3, padding="valid", dilation=2)), _images(6, 7)),
    "conv2d_modes": Problem(lambda: S(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(),
                                  nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh(),
                                  nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate")),
                            _images(5, 6)),
    "conv2d_groups": Problem(lambda: S(nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6),
                                   nn.Tanh(), nn.Conv2d(6, 4, 1, groups=2, bias=False)), _images(6, 6)),
    "conv3d": Problem(lambda: S(nn.Conv3d(3, 2, 2, padding=1), nn.Tanh(), nn.Conv3d(2, 2, 2, dilation=2)),
                      _images(3, 4, 4)),
    "conv_transpose": Problem(lambda: S(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.Tanh(),
                                    nn.ConvTranspose2d(4, 4, 2, groups=2, dilation=2)), _images(3, 4)),
    "positions": Problem(Positions, _ids),
    "positions_one_row": Problem(lambda: Positions(one_row=True), _ids),
    "positions_as_long_as_the_batch": Problem(Positions, _ids, batch=7),
    "positions_repeated": Problem(RepeatedPositions, _ids),
    "custom": Problem(Custom, _sequence),
    "class_token": Problem(ClassToken, _sequence),
    "functional": Problem(Functional, lambda n: torch.randn(n, 4, 6)),
    "frozen_parts": Problem(FrozenParts, _sequence),
    "in_place": Problem(InPlace, _sequence),
    "twice": Problem(Twice, _sequence, ruled=False),
    "tied": Problem(Tied, _ids, ruled=False),
    "one_plus": Problem(ScaledByOnePlus, _sequence, ruled=False),
    "attention": Problem(Attention, _sequence, ruled=False),
    "lstm": Problem(Recurrent, _sequence, ruled=False),
    "bilinear": Problem(BilinearModel, _sequence, ruled=False),
    "weight_norm": Problem(lambda: S(weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)),
                           _sequence, ruled=False),
    "prelu": Problem(lambda: S(nn.Linear(6, 4), nn.PReLU(7), nn.Linear(4, 2)), _sequence, ruled=False),
}  # fmt: skip


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean over samples of a smooth function of the output that treats no two entries alike."""
    out = model(batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(out[0].shape)
    return ((out - 0.3) * weights).square().flatten(1).sum(1).mean()
