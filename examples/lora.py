"""Fine-tuning with low-rank adapters: what is frozen is not measured, and the adapters have their own noise.

    python examples/lora.py

A small transformer learns the text of Python's reference, then source code of the standard library, through
adapters alone. The noise scale of the fine-tuning is compared with that of training everything.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from gradstats.demo.tasks import CONTEXT, CharTransformer

Draw = Callable[[int], tuple[Tensor, Tensor]]


class LoRA(nn.Module):
    """A frozen linear layer and a trained one of low rank beside it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # at first the model is what it was

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return out


def adapt(model: nn.Module, rank: int, scale: float) -> list[nn.Parameter]:
    """Freeze a model and put adapters beside its blocks' linear layers; returns what is to be trained."""
    model.requires_grad_(False)
    adapted = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is not None:  # all but the head
                adapter = LoRA(child, rank, scale)
                setattr(parent, name, adapter)
                adapted += [adapter.down.weight, adapter.up.weight]
    return adapted


def windows(text: str, alphabet: dict[str, int], generator: torch.Generator) -> Draw:
    """Draws batches of (characters, the characters that follow)."""
    ids = torch.tensor([alphabet[c] for c in text])

    def draw(size: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - CONTEXT, (size, 1), generator=generator)
        chunk = ids[starts + torch.arange(CONTEXT + 1)]
        return chunk[:, :-1], chunk[:, 1:]

    return draw


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(
    model: nn.Module, params: list[nn.Parameter], draw: Draw, steps: int, batch: int, rate: float
) -> gradstats.Monitor:
    """Train, print the losses of the beginning and the end, and return what was measured."""
    optimizer = torch.optim.AdamW(params, lr=rate)
    monitor = gradstats.attach(model, optimizer=optimizer, half_life=max(steps / 4, 1))
    losses = []
    for _ in range(steps):
        loss = loss_fn(model, draw(batch))
        loss.backward()
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    ends = max(steps // 10, 1)
    first, last = sum(losses[:ends]) / ends, sum(losses[-ends:]) / ends
    print(f"  {steps} steps of {batch}: loss {first:.3f} to {last:.3f}")
    monitor.detach()
    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60, help="of the fine-tuning")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    code = inspect.getsource(inspect) + inspect.getsource(argparse)
    alphabet = {c: i for i, c in enumerate(sorted(set(prose + code)))}
    generator = torch.Generator().manual_seed(args.seed)
    draw_prose = windows(prose, alphabet, generator)
    draw_code = windows(code, alphabet, generator)
    model = CharTransformer(len(alphabet), width=64, heads=4, layers=2)

    print("Pretraining on prose:")
    everything = list(model.parameters())
    train(model, everything, draw_prose, args.pretraining_steps, args.batch_size, 2e-3)
    pretrained = {name: value.clone() for name, value in model.state_dict().items()}

    print("Fine-tuning all parameters on code:")
    whole = train(model, everything, draw_code, args.steps, args.batch_size, 1e-3)
    print(f"  {whole.noise_scale()}")

    model.load_state_dict(pretrained)
    adapters = adapt(model, args.rank, scale=2.0)
    trained = sum(p.numel() for p in adapters)
    total = sum(p.numel() for p in model.parameters())
    print(f"Fine-tuning adapters of rank {args.rank}, {trained:,} of {total:,} parameters:")
    monitor = train(model, adapters, draw_code, args.steps, args.batch_size, 5e-3)
    print(f"  {monitor.noise_scale()}")
    print(monitor.recommend())


if __name__ == "__main__":
    main()
