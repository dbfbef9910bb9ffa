"""Random small models out of every part that gradstats measures, compared with the oracle.

A `Spec` says which parts follow each other, what they share, what is frozen or recomputed, in which
dtype, on which backend and in which micro-batches. `specs()` draws them for hypothesis;
`examine(spec)` measures one and compares it with plain autograd, one sample at a time.

    python tests/random_models.py --examples 5000
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from random_parts import WIDTH, WORDS
from random_specs import Model, Spec, specs
from torch import Tensor, nn

import gradstats

TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "autocast": 5e-2}


def loss(out: Tensor) -> Tensor:
    """Sum over samples of a smooth function that treats no two entries alike."""
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=torch.float64).view(out[0].shape)
    return ((out.double() - 0.3) * weights).square().sum()


def data(spec: Spec) -> Tensor:
    shape = sum(spec.micro_batches), spec.length
    return torch.randint(0, WORDS, shape) if spec.on_ids else torch.randn(*shape, WIDTH)


def truth(
    model: Model, batch: Tensor, dtype: torch.dtype = torch.float64, autocast: bool = False
) -> dict[str, Tensor]:
    """N·c_i of every sample by plain autograd, one sample at a time."""
    model = copy.deepcopy(model).to(dtype)
    model.recomputes = False
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    found: dict[str, list[Tensor]] = {}
    for i in range(len(batch)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(batch[i : i + 1])
        loss(out).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                found.setdefault(name, []).append(grad.double())
    return {name: torch.stack(grads) for name, grads in found.items()}


def train(spec: Spec, model: nn.Module, batch: Tensor) -> list[Tensor]:
    """Backward of every micro-batch; what came out of the forwards."""
    outputs = []
    for part in batch.split(list(spec.micro_batches)):
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.dtype == "autocast"):
            out = model(part)
        (loss(out) / len(batch)).backward()
        outputs.append(out.detach())
    return outputs


class Wrong(AssertionError):
    """A number that is off, with neither an error nor a statement that it is not covered."""


def examine(spec: Spec) -> list[str]:
    """Raises Wrong where a number is off; returns why parameters were refused, or an empty list."""
    torch.manual_seed(spec.seed)
    model, batch = Model(spec), data(spec)
    true, tolerance = truth(model, batch), TOLERANCE[spec.dtype]
    if spec.dtype != "float64":  # a model may amplify rounding: plain autograd shows how much
        try:
            rounded = truth(model, batch, torch.float32, spec.dtype == "autocast")
        except RuntimeError:  # torch has functions that do not take what autocast makes
            return []
        runs = [rounded]
        if spec.dtype == "autocast":  # whose roundings scatter: one run may happen to be close
            runs += [truth(_nearby(model), batch, torch.float32, True) for _ in range(3)]
        tolerance = max(tolerance, *(4 * _difference(true, run) for run in runs))
        true = true if spec.dtype == "float32" else rounded
    if spec.dtype == "float64":
        model, batch = model.double(), batch.double() if batch.is_floating_point() else batch
    plain = copy.deepcopy(model)
    with warnings.catch_warnings(), gradstats.backends.use(spec.backend):
        warnings.simplefilter("ignore")
        expected = train(spec, plain, batch)
        try:
            monitor = gradstats.attach(model, moments=spec.moments)
            for _ in range(2):  # the second step runs what the first one found out
                model.zero_grad()
                outputs = train(spec, model, batch)
                stats = monitor.step()
        except gradstats.GradStatsError as error:
            return [str(error)]
    for out, want in zip(outputs, expected, strict=True):
        _require(out.dtype == want.dtype, spec, f"outputs are {out.dtype}, not {want.dtype}")
        gap = float((out.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
        _require(gap <= tolerance, spec, f"outputs are off by {gap}")
    # Under autocast both gradients are rounded, each to within the tolerance of what it stands for.
    apart = 2 * tolerance if spec.dtype == "autocast" else tolerance
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            _require(p.grad is None, spec, f"{name} has a gradient")
        elif p.requires_grad:
            scale = max(float(q.grad.norm()), 1e-2 * _largest(true) ** 0.5)
            gap = float((p.grad.double() - q.grad.double()).norm())
            _require(gap <= apart * scale, spec, f"the gradient of {name} is off by {gap / scale}")
    compare(spec, stats, true, tolerance)
    return list(stats.coverage.missing.values())


def compare(
    spec: Spec, stats: gradstats.GradStats, true: dict[str, Tensor], tolerance: float
) -> None:
    largest, n = _largest(true), sum(spec.micro_batches)
    floor = tolerance * largest  # what cancels to less than this is rounding
    for name, g in true.items():
        if name in stats.coverage.missing:
            continue
        layer, sq = stats.layers[name], _squares(g)
        found = layer.per_sample_sq_norm.double()
        _require(found.shape == sq.shape, spec, f"{name}: {found.shape}")
        scale = max(float(sq.max()), 1e-2 * largest)
        gap = float((found - sq).abs().max()) / scale
        _require(gap <= tolerance, spec, f"{name}: squared norms are off by {gap}")
        _require(bool((found >= 0).all()), spec, f"{name}: a negative squared norm")
        gap = abs(float(layer.grad_sq_norm) - float(g.mean(0).square().sum())) / scale
        _require(gap <= 2 * tolerance, spec, f"{name}: grad_sq_norm is off by {gap}")
        if name in stats.grad_var and n > 1:
            var = g.var(0)
            gap = float((stats.grad_var[name].double() - var).abs().max())
            scale = max(float(var.max()), floor)
            _require(
                gap <= 10 * tolerance * scale, spec, f"{name}: variances are off by {gap / scale}"
            )


def _largest(true: dict[str, Tensor]) -> float:
    return max(1e-30, float(sum(_squares(g) for g in true.values()).max()))


def _squares(g: Tensor) -> Tensor:
    return g.reshape(len(g), -1).square().sum(1)


def _difference(true: dict[str, Tensor], rounded: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradients."""
    return max(float((rounded[n] - g).norm() / (1e-2 * _largest(true) ** 0.5 + g.norm()))
               for n, g in true.items())  # fmt: skip


def _nearby(model: Model) -> Model:
    """The model with parameters elsewhere within half a unit of bfloat16's last place."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2**-9 * (2 * torch.rand_like(p) - 1))
    return model


def _require(holds: bool, spec: Spec, what: str) -> None:
    if not holds:
        raise Wrong(f"{what}, in {spec}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=3000)
    parser.add_argument("--seed", type=int, help="draws the same models each time")
    parser.add_argument(
        "--go-on", action="store_true", help="list what is wrong, do not stop there"
    )
    options = parser.parse_args()
    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    def one(spec: Spec) -> None:
        counts["models"] += 1
        kinds.update(use.kind for use in spec.uses)
        try:
            refused = examine(spec)
        except Exception as error:
            counts["wrong"] += 1
            print(f"WRONG: {type(error).__name__}: {error}\n  {spec}", flush=True)
            if not isinstance(error, Wrong):
                traceback.print_exc(limit=-6)
            if not options.go_on:
                raise
            return
        counts["refused"] += bool(refused)
        if not any(use.recompute == "reentrant" for use in spec.uses):
            counts["refused without reentrant checkpoints"] += bool(refused)
        reasons.update(set(refused))

    run = settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate] if options.go_on else [Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        derandomize=options.seed is None,
    )(given(specs())(one))
    if options.seed is not None:
        run = seed(options.seed)(run)
    run()
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    for kind, count in kinds.most_common():
        print(f"  {count:6} {kind}")
    for reason, count in reasons.most_common():
        print(f"{count:6} {reason}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
