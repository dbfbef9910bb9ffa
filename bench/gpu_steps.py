"""Whole training steps on a GPU: compiled, bf16 autocast, with statistics and without.

What runs compiled in bf16 is checked on a tiny copy in float32 (see `check_compiled`). The peers run
eagerly in float32, as their hooks do not compile, beside an eager plain step in a case of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_ops import FP32_TOLERANCE, Case

import gradstats
from gradstats.errors import GradStatsError
from gradstats.workbench.bench.checks import Monitored, check_gradstats, check_peer, worst
from gradstats.workbench.bench.models import MODELS, Problem
from gradstats.workbench.bench.peers import PEERS, Refused, Step, first_line

LIMITS = {  # norms, norms + moments
    "gpt2-124m": (1.03, 1.08), "resnet-50": (1.15, None), "vit-b16": (1.05, None),
}  # fmt: skip
CHANNELS_LAST = ("resnet-50",)


def compiled_step(problem: Problem, kind: str) -> Callable[[], None]:
    """forward, backward, monitor.step(), optimizer.step(), zero_grad of a copy of the model."""
    device = problem.inputs.device.type
    model = copy.deepcopy(problem.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    monitor = None
    if kind != "plain":
        monitor = gradstats.attach(model, moments=kind == "norms+moments")
    run: Any = torch.compile(model) if device == "cuda" else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = problem.loss(run)
        loss.backward()
        if monitor is not None:
            monitor.step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak of allocated device memory during a step, above what is allocated before any."""
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_remarks(make: dict[str, Callable[[], Callable[[], None]]]) -> dict[str, str]:
    """Peak memory over the plain step's, each measured with no other variant alive."""
    peaks: dict[str, int] = {}
    for name, make_step in make.items():
        torch.cuda.empty_cache()
        peaks[name] = peak_bytes(make_step())
        torch._dynamo.reset()
    return {n: f"peak memory {p / peaks['plain'] - 1:+.2%}" for n, p in peaks.items()}


def check_compiled(name: str, device: str) -> float:
    """A tiny copy in float32: eager against float64, and compiled against eager."""
    problem = MODELS[name].make(tiny=True, device=device)
    try:
        errors, record = check_gradstats(problem)
    except GradStatsError as error:
        print(f"{name}: {error}")
        return float("inf")
    if device != "cuda":
        return errors["norms"]
    torch._dynamo.reset()
    model = copy.deepcopy(problem.model)
    monitor = gradstats.attach(model)
    problem.loss(torch.compile(model)).backward()
    stats = monitor.step()
    torch._dynamo.reset()
    found = stats.per_sample_sq_norm
    return max(errors["norms"], worst(found, record.per_sample_sq_norm.double()))


def step_cases(models: list[str], device: str, small: bool) -> Iterator[Case]:
    for name in models:
        problem = MODELS[name].make(tiny=small, device=device)
        if name in CHANNELS_LAST:
            problem = Problem(problem.model.to(memory_format=torch.channels_last),
                              problem.inputs.to(memory_format=torch.channels_last),
                              problem.targets)  # fmt: skip
        make = {kind: lambda p=problem, k=kind: compiled_step(p, k)
                for kind in ("plain", "norms", "norms+moments")}  # fmt: skip
        remarks = memory_remarks(make) if device == "cuda" else {}
        steps = {kind: step() for kind, step in make.items()}
        bounds = zip(("norms", "norms+moments"), LIMITS[name], strict=True)
        yield Case(
            f"{name} step", ("plain", steps.pop("plain")), steps,
            {kind: limit for kind, limit in bounds if limit is not None},
            check=lambda name=name: check_compiled(name, device), tolerance=FP32_TOLERANCE,
            remarks=remarks, warmup=4,
        )  # fmt: skip
        del steps, make
        yield peer_case(name, problem, device)


def peer_case(name: str, problem: Problem, device: str) -> Case:
    """Eager float32 steps of the peers on the model as it is, each checked against gradstats.

    Who refuses is named; who differs is timed with a remark that it is wrong.
    """
    case = Case(f"{name} step, eager float32", ("plain", Step(problem)), {}, warmup=3)
    try:
        errors, record = check_gradstats(problem)
    except GradStatsError as error:
        print(f"{case.name}: {error}")
        case.check = lambda: float("inf")
        return case
    case.check, case.tolerance = lambda: errors["norms"], FP32_TOLERANCE
    case.variants["gradstats norms"] = Monitored(problem)
    for peer, make in PEERS.items():
        try:
            step = make(problem)
            status, error = check_peer(step, record)
            case.variants[peer] = step
            case.remarks[peer] = "" if status == "ok" else f"{status} ({error:.0e})"
        except Exception as refusal:
            reason = str(refusal) if isinstance(refusal, Refused) else first_line(refusal)
            print(f"{case.name}, {peer}: refused: {reason}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return case
