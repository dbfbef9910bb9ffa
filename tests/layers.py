"""Modules, one for each way of using parameters that the rules and the fallback must get exactly right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Positions(nn.Module):
    """Token embedding plus a position embedding that has no batch dimension, as in GPT-2."""

    def __init__(self, one_row: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 6), nn.Embedding(9, 6)
        self.head = nn.Linear(6, 4, bias=False)
        self.one_row = one_row

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        at = at.unsqueeze(0) if self.one_row else at
        return self.head(torch.tanh(self.tokens(ids) + self.positions(at)))


class LaidOutPositions(Positions):
    """Positions written out for every sample, in each of the ways that are common."""

    def forward(self, ids: Tensor) -> Tensor:
        row = torch.arange(ids.shape[1])
        x = self.tokens(ids)
        x = x + self.positions(row.unsqueeze(0).expand(len(ids), -1))
        return self.head(torch.tanh(x))


class CopiedPositions(Positions):
    def forward(self, ids: Tensor) -> Tensor:
        at = (torch.arange(ids.shape[1]) // 2).repeat(len(ids), 1)
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
    def __init__(self, kind: type[nn.Module] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.inner = kind(6, 5, batch_first=True, **options)
        width = (2 if self.inner.bidirectional else 1) * (self.inner.proj_size or 5)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.inner(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(out) + last.mean((0, 2))[:, None, None]


class BilinearModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Bilinear(6, 6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x, torch.tanh(x)))


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another: the packed projection is cut in two."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(6, 2, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)  # the module's own order is sequence first
        memory = torch.tanh(x[:4])
        causal = torch.ones(len(x), 4, dtype=torch.bool).triu(2)
        out, shares = self.inner(x, memory, memory, attn_mask=causal)
        return self.head(out.transpose(0, 1)) + shares.mean((1, 2))[:, None, None]


class ThreeInputs(nn.Module):
    """Query, key and value all differ; keys and values may have widths of their own."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        sizes = {"kdim": 4, "vdim": 5} if wide else {}
        self.wide = wide
        self.inner = nn.MultiheadAttention(6, 3, batch_first=True, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (x[..., :4], x[..., 1:]) if self.wide else (torch.tanh(x), x.square())
        hidden = x[..., 0] > 1.5
        hidden = hidden & (torch.arange(x.shape[1]) > 0)  # a row of its own is always seen
        return self.inner(x, k, v, key_padding_mask=hidden)[0]


class Decoder(nn.Module):
    """The library's encoder and decoder layers as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        memory = self.encoder(x, src_mask=mask, is_causal=True)
        return self.decoder(torch.tanh(x), memory, tgt_mask=mask)


class Einsum(nn.Module):
    """Products written with einsum: a plain one, heads with weights of their own, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Parameter(torch.randn(6, 2, 4)), nn.Parameter(torch.randn(2, 4, 5))
        self.mix, self.scale = nn.Parameter(torch.randn(2, 4, 4)), nn.Parameter(torch.randn(4, 2))
        self.left = nn.Parameter(torch.randn(3, 7))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.tanh(torch.einsum("bti,ihd->bthd", x, self.q))
        heads = torch.tanh(torch.einsum("hde, bthd -> bteh", self.mix, heads))
        heads = torch.einsum("bteh,eh->bhte", heads, self.scale)
        out = torch.tanh(torch.einsum("bhte,heo->bto", heads, self.o))
        return torch.einsum("st,bto->bos", self.left, out)


class Slices(nn.Module):
    """Rows of one weight used apart; no row is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(x, self.weight[:4], self.bias[:4])
        b = F.linear(torch.tanh(x), self.weight[4:], self.bias[4:])
        return torch.cat((a, b), -1)


class OneSlice(nn.Module):
    """Some rows of a position table, not from its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Parameter(torch.randn(12, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.positions[2 : 2 + x.shape[1]]))


class Overlapping(Slices):
    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(x, self.weight[:5], self.bias[:5])
        return torch.cat((a, F.linear(torch.tanh(x), self.weight[4:], self.bias[4:])), -1)


class Bags(nn.Module):
    """Sums, means and maxima of embeddings, with repeated ids, padding and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.EmbeddingBag(13, 6, mode="sum", padding_idx=2)
        self.mean = nn.EmbeddingBag(13, 6, mode="mean", padding_idx=-1)
        self.max = nn.EmbeddingBag(13, 6, mode="max")
        self.ragged = nn.EmbeddingBag(13, 6, mode="sum", include_last_offset=True)
        self.open = nn.EmbeddingBag(13, 6)

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        weights = 0.5 + ids / 13.0
        weights = weights.to(self.sum.weight.dtype)
        kept = torch.arange(t) < ids[:, :1] % 4  # bags of several lengths, and empty ones
        cuts = F.pad(kept.sum(1).cumsum(0), (1, 0))
        flat = self.ragged(ids[kept], cuts, per_sample_weights=weights[kept])
        out = self.sum(ids, per_sample_weights=weights) + self.mean(ids) * self.max(ids)
        return out + torch.tanh(flat) + self.open(ids[kept], cuts[:-1])


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


class Checkpointed(nn.Module):
    """The oracle's pass, in float64, is a plain one."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.head, self.reentrant = nn.Linear(6, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if x.requires_grad and x.dtype == torch.float32:
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        else:
            x = self.inner(x)
        return self.head(torch.tanh(x))
