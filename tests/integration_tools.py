"""A tiny training for the adapters, and the plain loop that they are compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradstats

CLIP = 0.05  # below every gradient's norm here


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 2))


def data(size=96):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, x[:, :2] + torch.randn(size, 2, generator=generator))


def loader(size=96, batch=8):
    return DataLoader(data(size), batch_size=batch)


def rows_of(log):
    """A sink that keeps what it gets."""
    return lambda row, step: log.append({**row, "step": step})


def plain(model, batches, accumulation, optimizer, *, every=1, change=None, autocast=False):
    """Rows of a loop by hand, with clipping; `change`: {steps taken: new accumulation}, with its rate."""
    rows = []
    rate = optimizer.param_groups[0]["lr"] / accumulation
    monitor = gradstats.attach(model, optimizer=optimizer)
    log = gradstats.Log(monitor, rows_of(rows), every=every, layers=False)
    batches = list(batches)
    while batches:
        accumulation = (change or {}).get(log.steps, accumulation)
        if change:
            optimizer.param_groups[0]["lr"] = rate * accumulation
        number, losses = min(accumulation, len(batches)), []
        for x, y in batches[:number]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses.append(nn.functional.mse_loss(model(x), y))
            (losses[-1] / accumulation).backward()
        batches = batches[number:]
        stats = monitor.step()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats, loss=torch.stack([loss.detach() for loss in losses]).mean())
    monitor.detach()
    return rows


NUMBERS = ("step", "samples", "batch_size", "loss", "noise_scale", "tr_sigma", "true_grad_sq_norm")


def require_same(found, wanted, tolerance=1e-5):
    """Rows hold the same numbers."""
    assert len(found) == len(wanted), (len(found), len(wanted))
    for one, other in zip(found, wanted, strict=True):
        for name in NUMBERS if "loss" in wanted[0] else set(NUMBERS) - {"loss"}:
            assert (one[name] is None) == (other[name] is None), name
            torch.testing.assert_close(
                torch.tensor(float(one[name] or 0)), torch.tensor(float(other[name] or 0)),
                rtol=tolerance, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip
