"""Logs and result files to make reports of. Their numbers are made up, shaped as real ones are."""

from __future__ import annotations

import json
import math
import random

from gradstats.workbench import saved

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"python": "3.11.7", "gradstats": "0.1.0", "torch": "2.13.0"}, "machine": "x86_64",
    "cpu_capability": "AVX512", "cores": 2, "threads": 2, "gpu": None,
}  # fmt: skip
LAYERS = ("0.weight", "0.bias", "3.weight", "3.bias", "head.weight")


def rows(count=120, batch_size=32, seed=0, every=10, **more):
    """Rows of a log: the loss falls, the noise scale grows from 20 towards 400."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        done = (i + 1) / count
        noise = 20 + 380 * done
        shares = [draw.uniform(0.5, 1) * 2**-k for k in range(len(LAYERS))]
        made.append(
            {
                "step": (i + 1) * every,
                "samples": (i + 1) * every * batch_size,
                "seconds": 0.05 * (i + 1) * every,
                "batch_size": batch_size,
                "loss": 2.3 * math.exp(-4 * done) + 0.3 + draw.gauss(0, 0.03),
                "noise_scale": noise,
                "noise_scale_low": noise * 0.7,
                "noise_scale_high": noise * 1.6 if i > 5 else None,
                "tr_sigma": 30 * math.exp(-done),
                "true_grad_sq_norm": 30 * math.exp(-done) / noise,
                "num_skipped": 0,
                "coverage": 1.0,
                "learning_rate": 0.02 * (1 - 0.9 * done),
                **{
                    f"layer_share/{name}": share / sum(shares)
                    for name, share in zip(LAYERS, shares, strict=True)
                },
                **more,
            }
        )
    return made


def log(path, lines=None, **options):
    lines = rows(**options) if lines is None else lines
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def noise_scale(value=400.0, low=280.0, high=640.0):
    return {
        "value": value, "low": low, "high": high, "confidence": 0.9, "num_samples": 38_400,
        "num_steps": 1200, "num_skipped": 0, "tr_sigma": 11.0,
        "true_grad_sq_norm": 11.0 / value if value else None, "coverage": 1.0,
        "method": "per_sample", "calibration": None, "tokens_per_sample": None, "note": "",
        "geometry": "plain",
    }  # fmt: skip


def point(size, now=32, noise=400.0, seconds=None):
    steps = now / size * (size + noise) / (now + noise)
    return {
        "batch_size": size, "micro_batch_size": min(size, 128),
        "accumulation_steps": max(1, size // 128), "world_size": 1, "steps": steps,
        "samples": steps * size / now, "seconds": seconds, "cost": seconds, "hours": None,
        "price": None,
    }  # fmt: skip


def advice(size=256, now=32):
    curve = [
        point(b, now, seconds=1.2 - 0.1 * i) for i, b in enumerate((16, 32, 64, 128, 256, 512))
    ]
    return {
        **point(size, now, seconds=0.4),
        "low": 192,
        "high": 512,
        "learning_rate": 0.11,
        "reason": "noise scale 400 (90% interval 280 to 640), from 38,400 samples in 1,200 steps; "
        "a step takes 2 ms, plus 0.1 ms per sample",
        "curve": curve,
        "present": point(now, now, seconds=1.0),
        "steps_left": None,
        "present_batch_size": now,
    }


def measure():
    timing = {
        "update": 0.001,
        "launch": 0.002,
        "per_sample": 1e-4,
        "covariance": [[0.0] * 3] * 3,
        "misfit": 0.02,
        "points": [
            {
                "micro_batch_size": m, "accumulation_steps": 1, "seconds": 0.003 + 1e-4 * m,
                "low": 0.0029 + 1e-4 * m, "high": 0.0032 + 1e-4 * m, "peak_bytes": None,
            }
            for m in (16, 32, 64, 128)
        ],
        "world_size": 1,
        "memory_bytes": None,
        "device": "cpu",
    }  # fmt: skip
    return {
        "batch_size": 32,
        "steps": 1200,
        "noise_scale": noise_scale(),
        "layers": [
            {
                "name": name, "share": 0.5 / (k + 1) / 1.1417, "tr_sigma": 1.0,
                "noise_scale": 100.0 * k, "noise_scale_low": 80.0 * k,
                "noise_scale_high": 140.0 * k,
            }
            for k, name in enumerate(LAYERS)
        ],
        "step_seconds": {
            "plain": 0.0061, "measured": 0.0064, "ratio": 1.049, "low": 1.03, "high": 1.07,
        },
        "timing": timing,
        "advice": advice(),
        "coverage": 0.98,
        "missing": {"emb.weight": "sparse gradients"},
        "notes": [],
        "rows": rows(40, seed=3),
    }  # fmt: skip


def vram():
    points = [
        {
            "micro_batch_size": m, "peak_bytes": 3e9 + 1.6e8 * m, "seconds": 0.1, "ok": True,
            "why": "",
        }
        for m in (8, 16, 32, 64, 112)
    ]  # fmt: skip
    points.append(
        {
            "micro_batch_size": 128, "peak_bytes": None, "seconds": None, "ok": False,
            "why": "out of memory",
        }
    )  # fmt: skip
    return {
        "device": "a GPU of 24 GB",
        "budget_bytes": 23.5e9,
        "points": points,
        "fixed_bytes": 3e9,
        "bytes_per_sample": 1.6e8,
        "largest": 112,
        "recommended": 96,
        "margin": 0.1,
        "formula": {
            "total": 23.5e9, "model": 2.9e9, "per_sample": 1.6e8, "largest": 128, "chosen": 128,
        },
        "remarks": [],
    }  # fmt: skip


def lr_range(sizes=(16, 64, 256)):
    curves = []
    for size in sizes:
        rates = [1e-4 * 10 ** (i / 20) for i in range(80)]
        best = 0.02 * size**0.5
        smooth = [
            2.3 - 1.2 / (1 + (best / 8 / r) ** 2) + max(0.0, r / best - 1) ** 2 for r in rates
        ]
        smooth = [min(loss, 6.0) for loss in smooth]
        draw = random.Random(size)
        curves.append(
            {
                "batch_size": size, "learning_rates": rates,
                "losses": [loss + draw.gauss(0, 0.05) for loss in smooth], "smoothed": smooth,
                "low": best / 10, "high": best, "suggested": best / 3,
                "diverged_at": best * 3 if size < 256 else None,
            }
        )  # fmt: skip
    scaling = {"rule": "sqrt", "exponent": 0.5, "low": 0.42, "high": 0.57}
    return {"curves": curves, "scaling": scaling if len(sizes) > 1 else None}


def trial(size, steps, seed, final, plan=None):
    points = [
        {
            "step": steps * k // 40, "samples": size * steps * k // 40,
            "seconds": steps * k / 40 * (0.002 + 1e-4 * size), "loss": final + 2 * math.exp(-k / 6),
            "validation_loss": final + 0.05 + 2 * math.exp(-k / 6),
        }
        for k in range(1, 41)
    ]  # fmt: skip
    return {
        "plan": plan or f"{size}x{steps}", "batch_size": size, "learning_rate": 0.02 * size / 16,
        "seed": seed, "steps": steps, "samples": size * steps, "seconds": points[-1]["seconds"],
        "ok": True, "why": None, "curve": points, "final_loss": final,
        "validation_loss": final + 0.05, "gap": 0.05, "gradient_variance": 40.0 / size,
        "sharpness": None, "remarks": [],
    }  # fmt: skip


def mean(value, spread=0.01):
    return {"mean": value, "low": value - spread, "high": value + spread}


def sweep(seeds=4):
    plans = {16: 0.30, 64: 0.36, 256: 0.42}
    trials = [
        trial(size, 32_000 // size, seed, final + 0.008 * (seed % 3))
        for size, final in plans.items()
        for seed in range(seeds)
    ]
    names = [f"{size}x{32_000 // size}" for size in plans]
    summary = [
        {
            "plan": name, "batch_size": size, "validation_loss": mean(final + 0.05),
            "final_loss": mean(final), "gap": mean(0.05), "seconds": mean(3.0, 0.5),
            "top_eigenvalue": mean(20.0, 3.0),
        }
        for name, (size, final) in zip(names, plans.items(), strict=True)
    ]  # fmt: skip
    losses = dict(zip(names, (0.35, 0.41, 0.47), strict=True))
    verdicts = [
        {
            "by": by, "budget": budget, "measure": "validation_loss", "best": best, "tied": tied,
            "means": losses, "behind": {},
            "sentence": f"By {by}: {best} has the lowest validation loss.",
        }
        for by, budget, best, tied in (
            ("samples", 32_000, names[0], []),
            ("seconds", 3.4, names[2], [names[1]]),
        )
    ]  # fmt: skip
    points = [
        {"batch_size": b, "steps": 100 * (1 + 80 / b), "fitted": 100 * (1 + 80 / b)} for b in plans
    ]
    variances = [
        {
            "batch_size": b, "direct": 40 / b, "low": 36 / b, "high": 44 / b, "batches": 64,
            "by_monitor": 41 / b, "ratio": 40 / 41,
        }
        for b in plans
    ]  # fmt: skip
    return {
        "trials": trials,
        "summary": summary,
        "verdicts": verdicts,
        "variance": {
            "points": variances, "exponent": -0.99, "low": -1.04, "high": -0.95, "constant": 40.0,
            "worst": 0.02,
        },
        "steps_to_target": {
            "target": 0.6, "measure": "validation_loss", "points": points, "steps_min": 100.0,
            "critical_batch": 80.0, "worst_relative": 0.03,
        },
        "remarks": [],
        "interrupted": False,
    }  # fmt: skip


def critical():
    branches = []
    for times in (1, 2, 4, 8, 16):
        lag = 0.0 if times <= 4 else 0.02 * times
        curve = [
            {"samples": 500 * k, "loss": 0.8 + math.exp(-k / 10) + lag * k / 40}
            for k in range(1, 41)
        ]
        branches.append(
            {
                "multiplier": times, "batch_size": 32 * times, "learning_rate": 1e-3 * times**0.5,
                "curve": curve, "final": curve[-1]["loss"], "ok": times <= 4,
            }
        )  # fmt: skip
    return {
        "step": 1000, "branches": branches, "critical_batch_size": 128, "low": 64, "high": 256,
        "noise_scale": noise_scale(60.0, 45.0, 80.0),
        "calibration": {"value": 2.1, "low": 1.1, "high": 4.2, "steps": 0}, "remarks": [],
    }  # fmt: skip


def advise():
    plan = {
        "batch_size": 256, "micro_batch_size": 64, "accumulation_steps": 4, "world_size": 1,
        "learning_rate": 0.08, "warmup_steps": 120, "steps": 4000,
    }  # fmt: skip
    return {
        "plan": plan, "advice": advice(), "reasons": ["the noise scale is 400"],
        "remarks": ["use GroupNorm"],
    }  # fmt: skip


def bench():
    op = {
        "op": "linear", "shape": "T=1", "variant": "norms", "name": "linear T=1 norms",
        "backend": "cpu", "threads": 2, "seconds": 3.1e-4, "reference": "torch",
        "reference_seconds": 3.0e-4, "ratio": 1.03, "ratio_low": 1.01, "ratio_high": 1.06,
        "bytes_per_second": 1e10, "flops_per_second": 9e10, "of_ceiling": 0.81, "limit": "matrix",
    }  # fmt: skip
    torch = {"variant": "torch", "name": "linear T=1 torch", "backend": "torch", "ratio": 1.0}
    step = {"model": "mlp", "threads": 2, "status": "ok", "note": "", "reference": "plain"}
    plain = {
        "variant": "plain", "seconds": 0.004, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0,
    }  # fmt: skip
    ours = {"variant": "gradstats norms", "seconds": 0.0042, "ratio": 1.05}
    refused = {"variant": "opacus hooks norms", "seconds": None, "ratio": None, "status": "refused"}
    return {
        "ops": [{**op, **torch}, op, {**op, "name": "layer_norm", "limit": "bandwidth"}],
        "steps": [
            {**step, **plain},
            {**step, **ours, "ratio_low": 1.04, "ratio_high": 1.07},
            {**step, **refused, "note": "not installed (opacus)"},
        ],
        "ceilings": [{"bytes_per_second": 1.2e10, "flops_per_second": 1.1e11, "threads": 2}],
    }


RESULTS = {
    "measure": measure, "vram": vram, "lr_range": lr_range, "sweep": sweep, "critical": critical,
    "advise": advise, "bench": bench,
}  # fmt: skip


def result(folder, kind, **changes):
    """Write a result file of a kind, with some of its fields changed."""
    path = folder / f"{kind}.json"
    content = {"environment": ENVIRONMENT, "target": "train:example", **RESULTS[kind](), **changes}
    saved.write(path, kind, content)
    return path
