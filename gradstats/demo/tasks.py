"""What the demo trains: a small transformer on English text, a small network on digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstats.errors import GradStatsError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its optimizer and where its samples come from."""

    name: str
    title: str
    unit: str  # what one sample is, in the plural
    model: nn.Module
    optimizer: torch.optim.Optimizer
    draw: Callable[[int, torch.Generator], Batch]  # samples with replacement


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats per predicted character or image."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def make(name: str) -> Task:
    """The task "text" or "digits"; its parameters come from torch's global generator."""
    return {"text": text, "digits": digits}[name]()


# ---- text --------------------------------------------------------------------------------------

CONTEXT = 96  # characters


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class CharTransformer(nn.Module):
    """(B, T) characters to (B, T, vocabulary) logits of the characters that follow."""

    def __init__(self, vocabulary: int, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def text() -> Task:
    """Next-character prediction on the language reference that comes with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise GradStatsError(
            f"this Python comes without its documentation ({error}); use --task digits, or install "
            "the complete standard library"
        ) from error

    corpus = "\n\n".join(topics[name] for name in sorted(topics))
    vocabulary = {c: i for i, c in enumerate(sorted(set(corpus)))}
    ids = torch.tensor([vocabulary[c] for c in corpus])
    window = torch.arange(CONTEXT + 1)

    def draw(size: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(ids) - CONTEXT, (size, 1), generator=generator)
        chunk = ids[starts + window]
        return chunk[:, :-1], chunk[:, 1:]

    model = CharTransformer(len(vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    title = f"decoder-only transformer on {len(corpus):,} characters of Python's documentation"
    return Task("text", title, f"sequences of {CONTEXT} characters", model, optimizer, draw)


# ---- digits ------------------------------------------------------------------------------------

PIXEL_NOISE = 0.4  # standard deviation, beside pixels from 0 to 1


def digits() -> Task:
    """Handwritten digits of 8 × 8 pixels, with noise, or they would soon be learned by heart."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)

    def draw(size: int, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(labels), (size,), generator=generator)
        noise = torch.randn(size, *images.shape[1:], generator=generator)
        return images[rows] + PIXEL_NOISE * noise, labels[rows]

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        return [conv, nn.GroupNorm(8, outputs), nn.ReLU()]

    layers = stage(1, 32, 1) + stage(32, 64, 2) + stage(64, 64, 2)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    title = f"convolutional network on {len(labels):,} handwritten digits"
    return Task("digits", title, "images", model, optimizer, draw)
