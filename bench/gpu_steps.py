"""Whole training steps on a GPU: compiled, bf16 autocast, with statistics and without.

What runs compiled in bf16 is checked on a tiny copy in float32 (see `check_compiled`). The peers run
eagerly in float32, as their hooks do not compile, beside an eager plain step in a case of their own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_case import FP32_TOLERANCE, Case, Cases

import gradstats
from gradstats.errors import GradStatsError
from gradstats.workbench.bench.checks import Monitored, check_gradstats, check_peer, worst
from gradstats.workbench.bench.models import MODELS, Problem
from gradstats.workbench.bench.peers import PEERS, Refused, Step, first_line

LIMITS = {  # norms, norms + moments
    "gpt2-124m": (1.03, 1.08), "resnet-50": (1.15, None), "vit-b16": (1.05, None),
}  # fmt: skip
CHANNELS_LAST = ("resnet-50",)


def say_nothing() -> None:
    """In place of what tells that a case goes on."""


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


def measured(
    make: dict[str, Callable[[], Callable[[], None]]], alive: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The steps, compiled, and each one's peak memory over the plain step's.

    A peak is counted from what was allocated before the step was made: what other steps keep is in
    both numbers. So a step is compiled once, to be weighed and to be timed.
    """
    steps: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name, make_step in make.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        steps[name] = make_step()
        for _ in range(3):
            steps[name]()
        torch.cuda.synchronize()
        print(f"  {name}: three steps after {time.perf_counter() - begin:.0f} s", flush=True)
        alive()
        torch.cuda.reset_peak_memory_stats()
        steps[name]()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    remarks = {n: f"peak memory {p / peaks['plain'] - 1:+.2%}" for n, p in peaks.items()}
    return steps, remarks


def check_eager(name: str, device: str) -> tuple[float, Problem, Any]:
    """A tiny copy in float32 against float64: (error, the copy, its record)."""
    problem = MODELS[name].make(tiny=True, device=device)
    try:
        errors, record = check_gradstats(problem)
    except GradStatsError as error:
        print(f"{name}: {error}")
        return float("inf"), problem, None
    return errors["norms"], problem, record


def check_compiled(name: str, device: str) -> float:
    """The tiny copy eagerly, and compiled against eagerly."""
    error, problem, record = check_eager(name, device)
    if device != "cuda" or record is None:
        return error
    torch._dynamo.reset()
    model = copy.deepcopy(problem.model)
    monitor = gradstats.attach(model)
    problem.loss(torch.compile(model)).backward()
    stats = monitor.step()
    torch._dynamo.reset()
    found = stats.per_sample_sq_norm
    return max(error, worst(found, record.per_sample_sq_norm.double()))


def step_cases(
    models: list[str], device: str, small: bool, alive: Callable[[], None] = say_nothing
) -> Cases:
    """`alive` is called now and then by cases that take minutes to compile."""
    for name in models:
        yield f"{name} step", partial(step_case, name, device, small, alive)
    for name in models:
        title = f"{name} step, eager float32"
        yield title, partial(peer_case, title, name, device, small)


def problem_of(name: str, device: str, small: bool) -> Problem:
    problem = MODELS[name].make(tiny=small, device=device)
    if name not in CHANNELS_LAST:
        return problem
    last = torch.channels_last
    return Problem(
        problem.model.to(memory_format=last), problem.inputs.to(memory_format=last), problem.targets
    )


def step_case(name: str, device: str, small: bool, alive: Callable[[], None]) -> Case:
    error = check_compiled(name, device)  # first: it throws away what was compiled before
    alive()
    problem = problem_of(name, device, small)
    kinds = ("plain", "norms", "norms+moments")
    make = {kind: partial(compiled_step, problem, kind) for kind in kinds}
    if device == "cuda":
        steps, remarks = measured(make, alive)
    else:
        steps, remarks = {kind: step() for kind, step in make.items()}, {}
    limits = dict(zip(kinds[1:], LIMITS[name], strict=True))
    return Case(
        ("plain", steps.pop("plain")), steps, {k: v for k, v in limits.items() if v is not None},
        check=lambda: error, tolerance=FP32_TOLERANCE, remarks=remarks,
    )  # fmt: skip


def peer_case(title: str, name: str, device: str, small: bool) -> Case:
    """Eager float32 steps of the peers on the model as it is, each checked against gradstats.

    gradstats itself is checked on the tiny copy: norms of the whole ResNet-50 in float32, whoever
    takes them, are several 1e-5 off the truth, as some of its ReLUs open that are closed in float64.
    Who refuses is named; who differs is timed with a remark that it is wrong.
    """
    error = check_eager(name, device)[0]
    problem = problem_of(name, device, small)
    case = Case(("plain", Step(problem)), {}, check=lambda: error, tolerance=FP32_TOLERANCE)
    case.variants["gradstats norms"] = step = Monitored(problem)
    step.backward()
    record = step.stats
    step.zero_grad()
    for peer, make in PEERS.items():
        try:
            theirs = make(problem)
            status, off = check_peer(theirs, record)
            case.variants[peer] = theirs
            case.remarks[peer] = "" if status == "ok" else f"{status} ({off:.0e})"
        except Exception as refusal:
            reason = str(refusal) if isinstance(refusal, Refused) else first_line(refusal)
            print(f"{title}, {peer}: refused: {reason}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return case
