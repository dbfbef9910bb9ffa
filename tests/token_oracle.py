"""Every position's part of each gradient, by a pass per position; and a language model."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


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


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
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

    def __torch_function__(self, func, types, args=(), kwargs=None):
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


def _attention(query, key, value, width, heads, w_in, b_in, *rest, **options):
    """Self-attention of (T, B, E), from its definition."""
    assert query is key is value
    w_out, b_out = rest[4], rest[5]
    x = query.transpose(0, 1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2)
               for t in F.linear(x, w_in, b_in).chunk(3, -1))  # fmt: skip
    shares = torch.softmax(q @ k.transpose(-1, -2) / (width // heads) ** 0.5, -1)
    return F.linear((shares @ v).transpose(1, 2).flatten(2), w_out, b_out).transpose(0, 1), None


def per_token_gradients(model: nn.Module, batch: Tensor, run=token_loss) -> dict[str, Tensor]:
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


IDS = torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
