"""What ranks really send, on their sockets, against the formulas of gradstats.collective_cost."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rank_tools import Collectives, case
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradstats
from gradstats.collective_cost import (
    all_gather_bytes,
    all_reduce_bytes,
    moments_bytes,
    statistics_bytes,
)
from gradstats.schedulers import decide_on_first_rank

MESSAGE = (
    48  # gloo's header; a collective has several messages for each rank, and some without data
)
LAYERS, WIDTH = 60, 16


def sent() -> int:
    """Bytes that the other ends of this process's TCP connections have acknowledged."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            copy = os.dup(int(link.name))
        except OSError:  # the one that lists the folder
            continue
        try:
            end = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        with end, contextlib.suppress(OSError):  # raised by sockets that are not TCP's
            info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            if len(info) == 136:  # struct tcp_info: tcpi_bytes_acked
                total += struct.unpack_from("Q", info, 120)[0]
    return total


def settled() -> int:
    """`sent`, once it no longer changes: acknowledgements may take a while."""
    before, now = -1, sent()
    while before != now:
        time.sleep(0.15)
        before, now = now, sent()
    return now


def on_the_wire(call) -> int:
    """What this rank sends while `call` runs on all of them."""
    dist.barrier()
    before = settled()
    call()
    return settled() - before


@case(0)
def bytes_sent_are_those_of_the_model(rank: int, world: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).double()
    elements = sum(p.numel() for p in model.parameters())
    run = DistributedDataParallel(model)
    every: list[object] = [None] * world  # has talked: does the system count it?
    dist.all_gather_object(every, sys.platform == "linux" and settled() > 0)
    counted = all(every)
    figures: dict[str, list[float]] = {}
    for moments in (False, True):
        monitor = gradstats.attach(run, moments=moments)
        for _ in range(2):
            run.zero_grad()
            run(torch.randn(4, WIDTH, dtype=torch.float64)).square().sum(1).mean().backward()
            with Collectives() as collectives:
                found = on_the_wire(monitor.step) if counted else monitor.step()
        own = statistics_bytes(2 * LAYERS)
        added = moments_bytes(elements, 8) if moments else 0
        assert [n * size for n, size in collectives.sent] == [own] + [added] * moments
        monitor.detach()
        if counted:
            expected = all_gather_bytes(own, world) + all_reduce_bytes(added, world)
            assert expected <= found <= 1.01 * expected + 32 * world * MESSAGE
            figures[f"moments={moments}"] = [expected, found]
    # A decision: two broadcasts of a pickled pair, whatever the model.
    if counted:
        found = on_the_wire(lambda: decide_on_first_rank(lambda: (12, 345.6)))
        assert found <= (world - 1) * 300
        figures["decision"] = [found]
    return figures
