"""FSDP2 (`fully_shard`) with gradstats: `torchrun --nproc-per-node 2 examples/fsdp.py`.

Parameters, gradients and optimizer are sharded over the ranks. Every rank measures its own samples, and all
of them know the noise scale of the whole batch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

import gradstats


class Block(nn.Module):
    """Causal attention and a feed-forward part, over (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.wide = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.wide(x)


def network() -> nn.Sequential:
    """A small transformer over (B, T) tokens, whose positions its causal attention tells apart."""
    blocks = [Block(64, 4) for _ in range(2)]
    return nn.Sequential(nn.Embedding(64, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 64))


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that count on, with a tenth of the tokens at random; and each one's next token."""
    start = torch.randint(0, 64, (size, 1), generator=generator)
    tokens = (start + torch.arange(33)) % 64
    noise = torch.randint(0, 64, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.1, noise, tokens)
    return tokens[:, :-1], tokens[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fsdp"), help="folder for log and checkpoint"
    )
    settings = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda" if cuda else "cpu")
    first = dist.get_rank() == 0

    torch.manual_seed(0)
    model = network().to(device)
    for block in model[1:-2]:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after sharding: of the shards
    monitor = gradstats.attach(model, optimizer=optimizer)
    sinks = [gradstats.loggers.JsonLines(settings.out / "steps.jsonl")] if first else []
    log = gradstats.Log(monitor, *sinks, every=10)

    own = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(settings.steps):
        x, y = (part.to(device) for part in batch(settings.batch_size, own))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        stats = monitor.step()  # before clipping and optimizer.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats, loss=loss)

    if first:
        print(monitor.noise_scale())
        print(monitor.recommend())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    parts = {"model": model_state, "optimizer": optimizer_state}
    dcp.save(
        {**parts, "monitor": monitor.state_dict(), "log": log.state_dict()},
        checkpoint_id=settings.out / "checkpoint",
    )
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # gloo's threads may outlive the group. One that asks for the GIL in a dying interpreter, to let go of a
    # tensor, aborts the process ("terminate called without an active exception"): with plain torch too
    # (pytorch/pytorch issue 190489). All is written, so the process ends here.
    sys.stdout.flush()
    os._exit(0)
