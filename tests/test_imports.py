"""What an import loads, what must not be there to work, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_import_is_light() -> None:
    code = (
        "import sys, gradstats\n"
        "heavy = {'torch', 'triton', 'numpy', 'scipy', 'rich', 'typer', 'gradstats._C'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import gradstats.kernels\n"
        "assert 'triton' not in sys.modules\n"
        "gradstats.attach\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'gradstats._C' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_works_without_triton_and_without_the_extension() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None; sys.modules['gradstats._C'] = None\n"
        "import torch, gradstats\n"
        "m = torch.nn.Linear(3, 2); monitor = gradstats.attach(m, moments=True)\n"
        "m(torch.randn(4, 3)).square().sum().backward()\n"
        "s = monitor.step()\n"
        "assert s.coverage.fraction == 1 and float(s.tr_sigma) > 0\n"
        "from gradstats import backends\n"
        "assert backends.choose('linear_stats', 'cpu', torch.float32) == 'reference'\n"
        "try:\n"
        "    with backends.use('cpu'): torch.ops.gradstats.multi_sq_norm([torch.ones(2)])\n"
        "except gradstats.BackendError as e: assert 'GRADSTATS_BUILD=cpu' in str(e)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Who may import whom inside the package; everything else is a mistake.
EDGES = {
    "errors": set(),
    "reference": set(),
    "step_time": {"estimators"},
    "kept": {"errors"},
    "timing": {"estimators", "kept", "step_time"},
    "layouts": {"estimators", "step_time"},
    "batch_advice": {"words"},
    "collective_cost": {"estimators"},
    "comparison": {"estimators", "layouts", "step_time"},
    "advice": {"batch_advice", "calibration", "errors", "estimators", "layouts", "step_time"},
    "words": set(),
    "noise": {"errors", "words"},
    "ratios": set(),
    "estimators": {"errors", "noise", "ratios", "words"},
    "calibration": {"estimators", "ratios"},
    "stats": {"errors"},
    "backends": {"errors", "reference"},
    "ops": {"backends", "reference"},
    "grouping": {"errors"},
    "probes": {"grouping"},
    "loss_scale": {"errors"},
    "told": {"errors", "grouping", "interpose", "source", "tokens"},
    "rules": {"ops", "probes", "reference", "rules"},
    "calls": {"errors", "probes"},
    "layout": {"calls", "errors", "probes"},
    "uses": {"calls", "errors", "grouping", "layout", "probes", "rules"},
    "tracing": set(),
    "shortcuts": {"backends", "layout", "ops", "probes", "tracing"},
    "passes": {"calls", "errors", "grouping", "probes", "tracing"},
    "interpose": {
        "backends",
        "calls", "errors", "grouping", "layout", "ops",
        "passes", "probes", "rules", "shortcuts",
        "tracing", "uses",
    },
    "alike": set(),
    "expand": {"probes", "reference"},
    "fallback": {"alike", "calls", "errors", "expand", "interpose", "probes"},
    "record": {"backends", "errors", "grouping", "ops", "probes", "stats"},
    "distributed": {"errors"},
    "ranks": {"calls", "distributed", "errors", "interpose", "record"},
    "series": {"stats"},
    "tokens": {"calls", "errors", "grouping", "interpose", "layout", "probes", "rules"},
    "install": {
        "backends", "distributed", "errors", "fallback", "interpose", "probes", "shortcuts", "tokens",
    },
    "moments": {"distributed", "interpose", "ranks", "record"},
    "order": {"errors", "probes"},
    "self_check": {"errors", "ops", "probes", "reference"},
    "momentum": {"estimators"},
    "hessian": {"batches", "calls", "errors", "estimators", "install"},
    "roots": set(),
    "geometry": {"distributed", "errors", "estimators", "options", "roots", "stats"},
    "momentum_reader": {
        "distributed", "errors", "estimators", "momentum", "options", "series", "stats",
    },
    "agreement": {"errors"},
    "cadence": {"errors"},
    "options": {"cadence", "errors", "estimators", "loss_scale"},
    "source": {"estimators", "stats"},
    "per_sample": {
        "comm_hooks", "distributed", "errors", "estimators", "install", "moments", "options",
        "order", "ranks", "record", "self_check", "source", "stats", "told",
    },
    "norm_layers": {
        "calibration", "distributed", "errors", "estimators", "options", "per_sample", "record",
        "stats",
    },
    "parts": {"calls", "errors", "ops", "record", "source", "stats"},
    "part_source": {
        "distributed", "errors", "estimators", "options", "parts", "record", "source", "stats",
    },
    "micro_batch": {
        "distributed", "errors", "options", "order", "part_source", "parts", "probes", "record",
        "stats",
    },
    "rank_means": {
        "comm_hooks", "distributed", "errors", "options", "part_source", "parts", "record", "stats",
    },
    "monitor": {
        "advice", "agreement", "cadence", "calls", "distributed", "errors", "estimators", "geometry",
        "hessian", "layouts", "micro_batch", "momentum_reader", "norm_layers", "options", "per_sample",
        "rank_means", "series", "source", "stats",
    },
    "attaching": {"cadence", "estimators", "monitor", "options"},
    "rates": {"estimators"},
    "comm_hooks": {"errors"},
    "scaling": {"advice", "errors", "estimators", "rates"},
    "plan": set(),
    "loader": {"errors", "estimators", "plan"},
    "grouped_loader": {"batches", "errors", "estimators", "loader"},
    "schedulers": {
        "advice", "agreement", "cadence", "errors", "estimators", "rates", "scaling", "schedulers",
    },
    "optim": {"errors", "estimators", "optim", "stats"},
    "report": set(),
    "batches": set(),
    "mixing": {"calls"},
    "trial": {"attaching", "distributed", "errors", "fallback", "stats"},
    "truth": {"batches", "calls", "errors", "mixing", "trial"},
    "checking": {"batches", "calls", "distributed", "errors", "report", "trial", "truth"},
    "loggers": {
        "advice", "batch_advice", "errors", "estimators", "layouts", "loggers", "stats", "step_time",
    },
    "integrations": {
        "advice", "attaching", "errors", "integrations", "loggers", "monitor", "scaling",
        "schedulers", "stats",
    },
    "machine": set(),
    "extras": {"errors"},
    "terminal": {"errors", "words"},
    "workbench": {
        "advice", "attaching", "backends", "batch_advice", "batches", "calibration", "errors", "estimators",
        "fallback", "hessian", "kept", "layouts", "loggers", "machine", "monitor", "noise", "ops",
        "plan", "reference", "scaling", "schedulers", "stats", "step_time", "timing", "trial",
        "words", "workbench",
    },
    "commands": {
        "check_command", "commands", "demo", "doctor", "errors", "estimators", "loggers",
        "terminal", "words", "workbench",
    },
}  # fmt: skip


@pytest.mark.parametrize("part", EDGES)
def test_imports_go_one_way(part: str) -> None:
    place = ROOT / "gradstats" / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradstats"):
                parts = (node.module or "").split(".")
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    assert found <= EDGES[part], f"{part} imports {found - EDGES[part]}"
