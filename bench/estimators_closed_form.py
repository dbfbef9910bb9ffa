"""Every estimator of the noise scale against a closed form: its bias, and whether its intervals hold.

    python bench/estimators_closed_form.py [--processes N] [--json FILE]

Steps are drawn from the exact distribution of a linear regression's gradients (`closed_form.py`), and given
to the functions that a monitor gives its own to. Shown are the bias of tr Σ and |G|², in percent of the
truth with a standard error, that of their ratio over as many steps as bring it to ±10% (as it is, `value`,
and `unbiased`), and the share of nominal 90% intervals that hold the truth, for runs of several lengths;
then the same intervals for steps that resemble each other, and for a noise scale that moves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch
from closed_form import Array, Regression, Way, ways
from closed_form_monitors import (
    attached,
    by_curvature,
    by_geometry,
    by_momentum,
    by_norm_layers,
)
from torch import Tensor

from gradstats.estimators import NoiseScale, noise_scale
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment

DIM, SIGN = 64, 'geometry="sign"'
# Samples of a step, noise scale, steps.
SETTINGS = ((16, 80, 1_600_000), (64, 320, 800_000))
LENGTHS = (20, 60, 200)
RUNS = 1001  # at most, for a coverage
ENOUGH = 700  # runs, for a coverage to be shown
WITHIN = 0.06  # relative standard deviation of an estimate that is within 10% in nine of ten runs
BLOCK = 20_000  # steps in memory at a time
KEPT = 300_000  # steps whose mean gradients and variances are kept, and of normal gradients
CORRELATIONS = (0.5, 0.8)
HALVINGS = (math.inf, 1000, 300, 100)  # steps in which |G|² halves
HALF_LIFE = 50
CURVATURES = {12: 4000, 30: 2000}  # runs of so many windows
Pool = dict[str, Array]


def drawn(
    fixture: Regression, known: dict[str, Way], samples: int, steps: int, seed: int
) -> tuple[Pool, Tensor, Tensor]:
    """Each way's (tr Σ, |G|²) of every step, (2, K), and the first steps' mean gradients and variances."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = defaultdict(list)
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for begin in range(0, steps, BLOCK):
        sums = fixture.sums(samples, min(BLOCK, steps - begin), generator)
        for name, way in known.items():
            found[name].append(torch.stack(way.column(sums)))
        if begin < KEPT:
            means.append(sums.mean)
            variances.append(sums.var)
    pool = {name: torch.cat(parts, 1).numpy() for name, parts in found.items()}
    return pool, torch.cat(means), torch.cat(variances)


def runs_of(pairs: Array, length: int, most: int = RUNS) -> Array:
    """(R, C, K) of K = `length`, from (C, T), at `most` so many."""
    runs = min(most, pairs.shape[1] // length)
    return pairs[:, : runs * length].reshape(len(pairs), runs, length).swapaxes(0, 1)


def percent(values: Array, truth: float) -> dict[str, float]:
    """Bias of independent values, and its standard error, in percent of the truth."""
    relative = 100 * (values / truth - 1)
    return {"bias": float(relative.mean()), "error": float(relative.std() / len(values) ** 0.5)}


def covered(found: list[NoiseScale], truth: float) -> dict[str, float]:
    return {
        "share": float(np.mean([n.low <= truth <= n.high for n in found])),
        "runs": len(found),
    }


def measured(fixture: Regression, samples: int, steps: int, seed: int) -> dict[str, Any]:
    """Of each way: bias of both columns and of the ratio, and coverage by number of steps."""
    known = ways(fixture)
    pool, means, variances = drawn(fixture, known, samples, steps, seed)
    found = {
        name: of_way(fixture, samples, name, way, pool[name], variances)
        for name, way in known.items()
    }
    whole, first = pool["per_sample"], pool["one layer"]
    tr_sigma, square = known["per_sample"].truth

    def proxy(rows: Array) -> list[NoiseScale]:
        return by_norm_layers(fixture, samples, rows[:, :2], rows[:, 2:])

    found["norm_layers, calibrated"] = {
        "tr_sigma": found["one layer"]["tr_sigma"],
        "true_grad_sq_norm": found["one layer"]["true_grad_sq_norm"],
        **seen(proxy, np.concatenate([whole, first]), tr_sigma / square, enough(first[1])),
    }
    found["from_momentum"] = momentum(fixture, samples, whole[:, : len(means)], means)
    normal = replace(fixture, normal=True)
    sign = {SIGN: ways(normal)[SIGN]}
    pool, _, variances = drawn(normal, sign, samples, KEPT, seed + 100)
    name = f"{SIGN}, normal gradients"
    found[name] = of_way(normal, samples, SIGN, sign[SIGN], pool[SIGN], variances)
    return found


def of_way(
    fixture: Regression, samples: int, name: str, way: Way, pairs: Array, variances: Tensor
) -> dict[str, Any]:
    """Bias and coverage of one, from (2, T) of its steps and the first steps' `variances`."""
    tr_sigma, square = way.truth
    if name == SIGN:
        return of_signs(fixture, samples, way.truth, pairs[:, : len(variances)], variances)

    def look(rows: Array) -> list[NoiseScale]:
        if name == "one layer":
            return by_geometry(fixture, samples, "plain", rows, layer=True)
        if name.startswith("geometry"):
            return by_geometry(fixture, samples, name.split('"')[1], rows)
        return [noise_scale(np.full(len(row[0]), samples), *row) for row in rows]

    return {
        "tr_sigma": percent(pairs[0], tr_sigma), "true_grad_sq_norm": percent(pairs[1], square),
        **seen(look, pairs, tr_sigma / square, enough(pairs[1])),
    }  # fmt: skip


def of_signs(
    fixture: Regression, samples: int, truth: tuple[float, float], pairs: Array, variances: Tensor
) -> dict[str, Any]:
    """The same of steps by sign, whose ‖σ‖₁ a monitor makes of variances averaged over a run's steps."""
    norm, gain = truth
    norms: list[float] = []

    def look(rows: Array) -> list[NoiseScale]:
        shaped = variances[: rows.shape[0] * rows.shape[2]].unflatten(0, (len(rows), -1))
        found = by_geometry(fixture, samples, "sign", rows, variances=shaped)
        norms[:] = [n.tr_sigma for n in found]  # at last, of the runs that are long enough
        return found

    of_ratio = seen(look, pairs, (norm / gain) ** 2, enough(pairs[1], WITHIN / 2))
    return {
        "tr_sigma": percent(np.array(norms), norm), "true_grad_sq_norm": percent(pairs[1], gain),
        **of_ratio,
    }  # fmt: skip


def enough(squares: Array, within: float = WITHIN) -> int:
    """Steps until their mean |G|² has a relative standard deviation of `within`."""
    return math.ceil((squares.std() / squares.mean() / within) ** 2)


def both(found: list[NoiseScale], truth: float) -> dict[str, Any]:
    """Bias of the ratio as it is, of its median, and of the unbiased one; in percent of the truth."""
    values = np.array([n.value for n in found])
    unbiased = [n.unbiased for n in found if n.unbiased is not None]
    return {
        "value": percent(values, truth), "median": float(100 * (np.median(values) / truth - 1)),
        "unbiased": percent(np.array(unbiased), truth),
    }  # fmt: skip


def seen(
    look: Callable[[Array], list[NoiseScale]], pairs: Array, truth: float, enough: int
) -> dict[str, Any]:
    """Bias of the ratio in runs of `enough` steps, and coverage of its interval in runs of all lengths."""
    found = {length: look(runs_of(pairs, length)) for length in LENGTHS}
    found[enough] = look(runs_of(pairs, enough, most=pairs.shape[1]))
    # A proxy whose calibration has no interval says that it is of something else.
    by_length = {
        length: [n for n in of if n.method != "norm_layers" or n.calibration is not None]
        for length, of in found.items()
    }
    return {
        "noise_scale": {"steps": enough, **both(by_length[enough], truth)},
        "coverage": {str(k): covered(found, truth) for k, found in by_length.items()},
    }


def momentum(fixture: Regression, samples: int, pairs: Array, means: Tensor) -> dict[str, Any]:
    """The same of |G|² by a buffer, where single steps let it be used."""
    tr_sigma, square = ways(fixture)["per_sample"].truth
    coverage, bias = {}, {}
    for length in (60, 200):
        rows = runs_of(pairs, length)
        shaped = means[: len(rows) * length].view(len(rows), length, -1)
        own, found = by_momentum(fixture, samples, rows, shaped)
        used = sum("from the optimizer's" in n.note for n in found)
        coverage[str(length)] = {**covered(found, tr_sigma / square), "used": used}
        bias = {"steps": length, **both(found, tr_sigma / square)}
    return {
        "tr_sigma": percent(pairs[0], tr_sigma),
        "true_grad_sq_norm": percent(np.nanmean(own, axis=1), square),
        "noise_scale": bias, "coverage": coverage,
    }  # fmt: skip


# ---- steps that are not independent, and a noise scale that moves ---------------------------------


def correlated(pairs: Array, means: Array, phi: float) -> Array:
    """(R, 2, K) of independent steps made AR(1), with the same mean and variance."""
    out = pairs - means[:, None]
    for k in range(1, out.shape[2]):
        out[:, :, k] = phi * out[:, :, k - 1] + math.sqrt(1 - phi**2) * out[:, :, k]
    return out + means[:, None]


def with_correlation(pairs: Array, truth: tuple[float, float], samples: int) -> dict[str, Any]:
    """Coverage for steps that resemble each other, `pairs` (2, T)."""
    found = {}
    for phi in CORRELATIONS:
        for length in (60, 200):
            for half_life in (500.0, math.inf):
                rows = correlated(runs_of(pairs, length), np.array(truth), phi)
                seen = [
                    noise_scale(np.full(length, samples), *row, half_life=half_life) for row in rows
                ]
                found[f"phi {phi}, {length} steps, half-life {half_life:g}"] = covered(
                    seen, truth[0] / truth[1]
                )
    return found


def moving(samples: int, noise: float) -> dict[str, Any]:
    """Of |G|² that halves in so many steps; the noise scale is `noise` at the last of a run."""
    steps, found, generator = 250, {}, torch.Generator().manual_seed(51)
    fixture = Regression.with_noise_scale(DIM, noise)
    variance = 4 * fixture.sigma**2 * DIM
    weights = np.exp2(-np.arange(steps)[::-1] / HALF_LIFE)
    for halving in HALVINGS:
        distance = np.exp2(np.arange(steps)[::-1] / 2 / halving)  # 1 at the end
        tr, sq = variance + 4 * (DIM + 1) * distance**2, 4 * distance**2
        far = torch.from_numpy(np.tile(distance, BLOCK // steps)).float()
        rows: list[Array] = []
        known = ways(fixture)["per_sample"]
        for _ in range(math.ceil(RUNS * steps / BLOCK)):
            column = torch.stack(known.column(fixture.sums(samples, len(far), generator, far)))
            rows += list(runs_of(column.numpy(), steps))
        seen = [noise_scale(np.full(steps, samples), *r, half_life=HALF_LIFE) for r in rows]
        smoothed = float((weights @ tr) / (weights @ sq))
        value = float(np.median([n.value for n in seen]))
        found[f"{halving:g}"] = {
            "lag": smoothed / (tr[-1] / sq[-1]) - 1, "value": value / smoothed - 1,
            "of the average": covered(seen, smoothed), "of the last step": covered(seen, noise),
        }  # fmt: skip
    return found


def curvatures() -> dict[str, Any]:
    """tr(HΣ), GᵀHG and their ratios, of unequal curvature."""
    fixture = Regression(1 / torch.arange(1, 33).sqrt(), torch.ones(32) / 2, 1.0)
    h, grad = 2 * fixture.curvature.double(), fixture.grad
    truth = {
        "tr_h_sigma": float((h * fixture.var).sum()), "g_h_g": float((h * grad**2).sum()),
        "tr_sigma": float(fixture.var.sum()), "true_grad_sq_norm": float(grad.square().sum()),
    }  # fmt: skip
    ratios = {
        "noise_scale": truth["tr_h_sigma"] / truth["g_h_g"],
        "max_learning_rate": truth["true_grad_sq_norm"] / truth["g_h_g"],
    }
    generator = torch.Generator().manual_seed(52)
    found: dict[str, Any] = {"truth": truth | ratios}
    for windows, runs in CURVATURES.items():
        seen = by_curvature(fixture, 64, windows, runs, generator)
        means = {k: np.array([np.mean(getattr(c, k)) for c in seen]) for k in truth}
        found[str(windows)] = {
            **{k: percent(v, truth[k]) for k, v in means.items()},
            **{k: {**both(of, v), **covered(of, v)} for k, v in ratios.items()
               if (of := [getattr(c, k) for c in seen])},
        }  # fmt: skip
    return found


def summary(found: dict[str, Any]) -> list[list[str]]:
    """A row for each estimator: the range of its figures over all settings."""
    rows = []
    for name in next(iter(found.values())):
        of = [settings[name] for settings in found.values()]
        shares = [c["share"] for f in of for c in f["coverage"].values() if c["runs"] >= ENOUGH]
        row = [name]
        for column in COLUMNS:
            each = [f.get(column) or f["noise_scale"][column] for f in of]
            biases, error = [b["bias"] for b in each], max(b["error"] for b in each)
            row.append(
                f"{min(biases):+.2f} to {max(biases):+.2f} (± {error:.2f})".replace("-", "−")
            )
        rows.append([*row, f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"])
    return rows


HEAD = ["estimator", "tr Σ, %", "|G|², %", "value, %", "unbiased, %", "coverage, %"]
COLUMNS = ("tr_sigma", "true_grad_sq_norm", "value", "unbiased")


def of_correlated_steps() -> dict[str, Any]:
    fixture = Regression.with_noise_scale(DIM, 80)
    known = {"per_sample": ways(fixture)["per_sample"]}
    pairs = drawn(fixture, known, 16, RUNS * max(LENGTHS), 50)[0]["per_sample"]
    return with_correlation(pairs, known["per_sample"].truth, 16)


def of_setting(seed: int) -> dict[str, Any]:
    samples, noise, steps = SETTINGS[seed]
    return measured(Regression.with_noise_scale(DIM, noise), samples, steps, seed)


def of_attached() -> dict[str, float]:
    generator = torch.Generator().manual_seed(60)
    return attached(Regression.with_noise_scale(DIM, 320), 64, 300, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--json", type=Path, default=checkout.RESULTS / "estimators_closed_form.json"
    )
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment("gradstats")}
    with ProcessPoolExecutor(
        args.processes, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        settings = [pool.submit(of_setting, seed) for seed in range(len(SETTINGS))]
        others = {
            "correlated": pool.submit(of_correlated_steps),
            "moving": pool.submit(moving, 16, 80),
            "curvature": pool.submit(curvatures),
            "attached": pool.submit(of_attached),
        }
        report["settings"] = {
            f"B {samples}, B_noise {noise}": future.result()
            for (samples, noise, _), future in zip(SETTINGS, settings, strict=True)
        }
        report |= {name: future.result() for name, future in others.items()}
    report["summary"] = summary(report["settings"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(HEAD, report["summary"]))
    for name in others:
        print(name, json.dumps(report[name], indent=1))


if __name__ == "__main__":
    main()
