"""The process in which `gpu.py` checks and times: one that may die or hang without ending the run."""

from __future__ import annotations

import argparse
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_case import Case, Cases
from gpu_gather import conv_cases, embedding_cases, tied_cases
from gpu_ops import linear_cases, multi_cases, norm_cases
from gpu_steps import step_cases

from gradstats.errors import first_line
from gradstats.workbench.bench.models import MODELS
from gradstats.workbench.bench.timing import Spread, interleave, ratios

OPERATIONS = {
    "linear": linear_cases,
    "norm": norm_cases,
    "embedding": embedding_cases,
    "conv": conv_cases,
    "tied": tied_cases,
}
GROUPS = ("linear", "multi", "norm", "steps", "conv", "embedding", "tied")  # in this order
Tell = Callable[[str, str, Any], None]  # what happened, to which case, and with what result


def cases(args: argparse.Namespace, device: str, small: bool, alive: Callable[[], None]) -> Cases:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for group in GROUPS:
        if group not in args.only:
            continue
        if group == "steps":
            yield from step_cases(args.models, device, small, alive)
        elif group == "multi":
            model = MODELS["gpt2-124m"].make(tiny=small).model
            yield from multi_cases(device, [tuple(p.shape) for p in model.parameters()])
        else:
            yield from OPERATIONS[group](device, dtype, small)


def rows(
    name: str, case: Case, error: float, seconds: dict[str, list[float]]
) -> Iterator[dict[str, Any]]:
    for variant, ratio in ratios(seconds, case.base[0]).items():
        time = Spread.of(seconds[variant]).median / case.per_call
        limit = case.limits.get(variant)
        yield {
            "case": name,
            "variant": variant,
            "seconds": time,
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.low, ratio.high],
            "limit": limit,
            "within": None if limit is None else ratio.median <= limit,
            "tflops": case.flops / time / 1e12 if case.flops else None,
            "gb_per_s": case.bytes_moved / time / 1e9 if case.bytes_moved else None,
            "error": error,
            "remark": case.remarks.get(variant, ""),
        }


def measure(name: str, make: Callable[[], Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check a case, then time it; a dry run calls what would be timed once, without a clock.

    Raises ArithmeticError where the check fails: nothing that is wrong is timed.
    """
    case = make()
    error = case.check()
    right = error <= case.tolerance
    verdict = "ok" if right else "WRONG, not timed"
    print(f"{name}: error {error:.1e}, at most {case.tolerance:.0e}: {verdict}", flush=True)
    if not right:
        raise ArithmeticError(f"off by {error:.1e}")
    variants = dict([case.base, *case.variants.items()])
    if args.dry_run:
        for call in variants.values():
            call()
        return []
    seconds = interleave(
        variants,
        rounds=args.rounds,
        warmup=case.warmup,
        turn_seconds=args.turn_seconds,
        device="cuda",
    )
    return list(rows(name, case, error, seconds))


def work(args: argparse.Namespace, device: str, done: frozenset[str], tell: Tell) -> None:
    """Every case that is not done yet: it is told that one begins, and its rows or why it failed.

    An error of CUDA's own leaves nothing that this process could still run: it ends then, and the
    next one goes on after the case that failed.
    """
    for message in (".*full backward hook.*", ".*performance drop.*"):
        warnings.filterwarnings("ignore", message=f"(?i){message}")
    torch.backends.cudnn.allow_tf32 = False  # what is checked in float32 is float32
    alive = partial(tell, "alive", "", None)
    for name, make in cases(args, device, small=device == "cpu", alive=alive):
        if name in done:
            continue
        tell("begun", name, None)
        try:
            tell("rows", name, measure(name, make, args))
        except Exception as error:
            if not isinstance(error, ArithmeticError):
                traceback.print_exc()
            tell("failed", name, first_line(error))
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                os._exit(1)  # at once: to take the context apart could hang
    tell("end", "", None)
