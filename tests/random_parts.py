"""The parts of random models: modules that take (B, T, WIDTH) and (B, T) ids to (B, T, WIDTH)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

WIDTH, WORDS, LONGEST = 6, 13, 9


class Part(nn.Module):
    """Runs `run(module, x, ids)` on its module, which holds all parameters."""

    def __init__(
        self, module: nn.Module, run: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.run(self.module, x, ids)


def _plain(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return m(x)


def _channels(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return m(x.transpose(1, 2)).transpose(1, 2)


def _pictures(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """(B, T, 6) as pictures of 3 channels, T high and 2 wide."""
    return m(x.unflatten(2, (3, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)


class Raw(nn.Module):
    """Parameters of the given shapes under the names a, b, …"""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in zip("abcdef", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def _flattened(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return m(x.reshape(-1, WIDTH)).view(x.shape)


def _functions(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, m.a, m.b)) @ m.c.t() * m.d - m.e


def _addmm(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    return x + torch.addmm(m.b, torch.tanh(x.sum(1)), m.a).unsqueeze(1)


def _einsum(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    heads = torch.tanh(torch.einsum("bti,ihd->bthd", x, m.a))
    heads = torch.einsum("hde,bthd->bteh", m.b, heads)
    return torch.einsum("bteh,heo->bto", heads, m.c)


def _positions(m: nn.Embedding, x: Tensor, ids: Tensor) -> Tensor:
    return x + m(torch.arange(x.shape[1]))


def _one_row(m: nn.Embedding, x: Tensor, ids: Tensor) -> Tensor:
    return x + m(torch.arange(x.shape[1])[None] // 2)


def _class_token(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    longer = torch.cat([m.a.expand(len(x), -1, -1), x], 1)
    return longer[:, 1:] + longer.mean(1, keepdim=True) * m.b[: x.shape[1]]


def _norm_by_hand(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * m.a


def _one_plus(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    return x * (1 + m.a)


def _attend(m: nn.MultiheadAttention, x: Tensor, ids: Tensor) -> Tensor:
    return m(x, x, x, need_weights=False)[0]


def _cross_attend(m: nn.MultiheadAttention, x: Tensor, ids: Tensor) -> Tensor:
    memory = torch.tanh(x[:, :1] + x)
    out, shares = m(x, memory, memory)
    return out + shares.mean(2, keepdim=True)


def _recur(m: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    out, state = m(x)
    last = state[0] if isinstance(state, tuple) else state
    return out + last.mean((0, 2))[:, None, None]


def _bilinear(m: nn.Bilinear, x: Tensor, ids: Tensor) -> Tensor:
    return m(x, torch.sin(x))


def _left(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    return m.a @ x


def _bag(m: nn.EmbeddingBag, x: Tensor, ids: Tensor) -> Tensor:
    return x + m(ids).unsqueeze(1)


def _weighted_bag(m: nn.EmbeddingBag, x: Tensor, ids: Tensor) -> Tensor:
    weights = (0.5 + ids / WORDS).to(m.weight.dtype)
    return x + m(ids, per_sample_weights=weights).unsqueeze(1)


def _look_up(m: nn.Embedding, x: Tensor, ids: Tensor) -> Tensor:
    return x + m(ids.flip(1))


def _slices(m: Raw, x: Tensor, ids: Tensor) -> Tensor:
    return torch.cat((F.linear(x, m.a[:2]), F.linear(x.square(), m.a[2:])), -1)


def _batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(WIDTH).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm


def _conv(**options: object) -> nn.Module:
    return nn.Conv1d(WIDTH, WIDTH, 3, **{"padding": 1, **options})


def _instance_norm(length: int) -> Part:
    if length == 1:  # refuses a single position
        return Part(nn.GroupNorm(2, WIDTH), _channels)
    return Part(nn.InstanceNorm1d(WIDTH, eps=1e-2, affine=True), _channels)


W = WIDTH
PARTS: dict[str, Callable[[int], nn.Module]] = {
    "nothing": lambda t: Part(nn.Identity(), _plain),
    "linear": lambda t: Part(nn.Linear(W, W), _plain),
    "linear without bias": lambda t: Part(nn.Linear(W, W, bias=False), _plain),
    "two linear": lambda t: Part(nn.Sequential(nn.Linear(W, 4), nn.GELU(), nn.Linear(4, W)), _plain),
    "conv": lambda t: Part(_conv(), _channels),
    "grouped conv": lambda t: Part(_conv(groups=3), _channels),
    "depthwise conv": lambda t: Part(_conv(groups=W, bias=False), _channels),
    "circular conv": lambda t: Part(_conv(padding_mode="circular"), _channels),
    "replicating conv": lambda t: Part(_conv(padding_mode="replicate", groups=2), _channels),
    "same conv": lambda t: Part(_conv(padding="same", dilation=2), _channels),
    "reflecting conv2d": lambda t: Part(nn.Conv2d(3, 3, (1, 3), padding=(0, 1),
                                                  padding_mode="reflect"), _pictures),
    "conv2d": lambda t: Part(nn.Conv2d(3, 3, 3, padding=1), _pictures),
    "transposed conv": lambda t: Part(nn.ConvTranspose1d(W, W, 3, padding=1), _channels),
    "grouped transposed conv": lambda t: Part(nn.ConvTranspose1d(W, W, 3, padding=1, groups=2), _channels),
    "transposed conv2d": lambda t: Part(nn.ConvTranspose2d(3, 3, 3, padding=1), _pictures),
    "layer norm": lambda t: Part(nn.LayerNorm(W), _plain),
    "wide layer norm": lambda t: Part(nn.LayerNorm((t, W), bias=False), _plain),
    "rms norm": lambda t: Part(nn.RMSNorm(W, eps=1e-3), _plain),
    "group norm": lambda t: Part(nn.GroupNorm(2, W), _channels),
    "instance norm": _instance_norm,
    "batch norm": lambda t: Part(_batch_norm(), _channels),
    "positions": lambda t: Part(nn.Embedding(LONGEST, W), _positions),
    "positions of one row": lambda t: Part(nn.Embedding(LONGEST, W), _one_row),
    "class token": lambda t: Part(Raw((1, 1, W), (LONGEST, 1)), _class_token),
    "norm by hand": lambda t: Part(Raw((W,)), _norm_by_hand),
    "one plus": lambda t: Part(Raw((W,)), _one_plus),
    "functions": lambda t: Part(Raw((W, W), (W,), (W, W), (1, 1, W), ()), _functions),
    "addmm": lambda t: Part(Raw((W, W), (W,)), _addmm),
    "product from the left": lambda t: Part(Raw((t, t)), _left),
    "einsum": lambda t: Part(Raw((W, 2, 4), (2, 4, 3), (2, 3, W)), _einsum),
    "slices": lambda t: Part(Raw((W, W)), _slices),
    "prelu": lambda t: Part(nn.PReLU(W), _channels),
    "one prelu": lambda t: Part(nn.PReLU(), _plain),
    "bilinear": lambda t: Part(nn.Bilinear(W, W, W), _bilinear),
    "attention": lambda t: Part(nn.MultiheadAttention(W, 2, batch_first=True), _attend),
    "cross attention": lambda t: Part(nn.MultiheadAttention(W, 3, batch_first=True), _cross_attend),
    "encoder layer": lambda t: Part(
        nn.TransformerEncoderLayer(W, 2, 8, dropout=0.0, batch_first=True), _plain),
    "lstm": lambda t: Part(nn.LSTM(W, W, batch_first=True), _recur),
    "gru": lambda t: Part(nn.GRU(W, 3, bidirectional=True, batch_first=True), _recur),
    "rnn": lambda t: Part(nn.RNN(W, W, num_layers=2, bias=False, batch_first=True), _recur),
    "projected lstm": lambda t: Part(nn.LSTM(W, 8, proj_size=W, batch_first=True), _recur),
    "weight norm": lambda t: Part(weight_norm(nn.Linear(W, W)), _plain),
    "lora": lambda t: Part(LoRA(), _plain),
    "flattened": lambda t: Part(nn.Sequential(nn.LayerNorm(W), nn.Linear(W, W)), _flattened),
    "bag": lambda t: Part(nn.EmbeddingBag(WORDS, W, mode="mean", padding_idx=2), _bag),
    "maximum bag": lambda t: Part(nn.EmbeddingBag(WORDS, W, mode="max"), _bag),
    "weighted bag": lambda t: Part(nn.EmbeddingBag(WORDS, W, mode="sum"), _weighted_bag),
    "lookup": lambda t: Part(nn.Embedding(WORDS, W, padding_idx=1), _look_up),
}  # fmt: skip
ON_IDS = {"bag", "maximum bag", "weighted bag", "lookup"}
