"""`gradstats doctor`: what can run here, what is chosen and why, and how to get what is missing."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib import metadata
from typing import Any

import torch

import gradstats
from gradstats import backends
from gradstats.errors import GradStatsError, first_line
from gradstats.extras import extras
from gradstats.machine import gigabytes, machine
from gradstats.ops import SCHEMAS, ops
from gradstats.terminal import console_and_table

NAMES = ("reference", "cpu", "triton", "cuda")
OPERATIONS = tuple(SCHEMAS)
DTYPE = torch.float32


def examine() -> dict[str, Any]:
    """The whole report, as JSON can hold it; `ok` is False where a forced backend cannot run."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {name: _backend(name, devices) for name in NAMES}
    forced, error = _forced(found)
    here = machine()
    chosen = {}
    if error is None:  # else the one error says it all
        chosen = {device: {op: _choice(op, device) for op in OPERATIONS} for device in devices}
    return {
        "ok": error is None,
        "error": error,
        "forced": forced,
        "dtype": str(DTYPE).removeprefix("torch."),
        "devices": devices,
        "versions": _versions(),
        "extension": _extension(),
        "backends": found,
        "chosen": chosen,
        "missing": _missing(devices),
        "extras": [extra.to_dict() for extra in extras()],
        "machine": here.to_dict(),
        "limits": here.limits(),
    }


def build_line(part: str = "cpu") -> str:
    """The command that builds the extension."""
    return f"GRADSTATS_BUILD={part} pip install --no-build-isolation -e ."


def doctor(*, as_json: bool) -> int:
    """Print the report and return the exit code: 1 where a forced backend cannot run, else 0."""
    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0 if report["ok"] else 1


# ---- finding out -------------------------------------------------------------------------------


def _backend(name: str, devices: list[str]) -> dict[str, Any]:
    """Whether a backend runs on a device of this machine, tried out, and why or why not."""
    serves = {
        device: [op for op in OPERATIONS if backends.refusal(name, op, device, DTYPE) is None]
        for device in devices
    }
    works, failures = [], []
    for device, operations in serves.items():
        if operations:
            failure = _try(name, device, operations)
            failures += [failure] if failure else []
            works += [] if failure else [device]
    why = f"runs on {' and '.join(works)} tensors" if works else "; ".join(failures)
    if not why:
        home, operation = ("cpu" if name == "cpu" else "cuda"), "linear_stats"
        if name == "cuda":
            operation = "multi_sq_norm"
        why = backends.refusal(name, operation, home, DTYPE) or "no CUDA device is present"
    return {"runs": bool(works), "why": why, "devices": works, "operations": serves}


def _try(name: str, device: str, operations: list[str]) -> str | None:
    """Run one small operation and compare it with the reference; what went wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 5, 8, generator=generator).to(device) for _ in range(2))
    operation = "linear_stats" if "linear_stats" in operations else operations[0]
    arguments: tuple[Any, ...] = (x, g, True, True, False)
    if operation == "multi_sq_norm":
        arguments = ([x, g],)
    try:
        with backends.use("reference"):
            expected = getattr(ops, operation)(*arguments)
        with backends.use(name):  # type: ignore[arg-type]
            seen = getattr(ops, operation)(*arguments)
        if not isinstance(seen, tuple):
            expected, seen = (expected,), (seen,)
        for e, s in zip(expected, seen, strict=True):
            # Matrix units may round float32 products to TF32.
            torch.testing.assert_close(s, e, rtol=5e-3, atol=5e-3)
    except Exception as error:  # anything at all may be wrong with an installation
        return f"{operation} failed on {device} tensors: {first_line(error)}"
    return None


def _choice(op: str, device: str) -> dict[str, str | None]:
    """The backend that runs `op` on this device's tensors, and why it is that one."""
    try:
        name = backends.choose(op, device, DTYPE)
    except GradStatsError as error:
        return {"backend": None, "why": str(error)}
    if name == backends.forced():
        return {"backend": name, "why": "asked for by GRADSTATS_BACKEND"}
    passed_over = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device]
    if name in passed_over:
        passed_over = passed_over[: passed_over.index(name)]
    refusals = [(n, backends.refusal(n, op, device, DTYPE)) for n in passed_over]
    whys = [f"not {n}: {why.partition('; ')[0]}" for n, why in refusals if why]
    return {"backend": name, "why": "; ".join(whys) or f"the fastest for {device} tensors"}


def _forced(found: dict[str, dict[str, Any]]) -> tuple[str, str | None]:
    """What GRADSTATS_BACKEND asks for, and why that cannot be had, if so."""
    try:
        forced = backends.forced()
    except GradStatsError as error:
        return (os.environ.get("GRADSTATS_BACKEND") or "auto"), str(error)
    if forced == "auto" or found[forced]["runs"]:
        return forced, None
    why = found[forced]["why"]
    return forced, f"GRADSTATS_BACKEND={forced} cannot run here: {why}"


def _versions() -> dict[str, str | None]:
    return {
        "gradstats": gradstats.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    module, why = backends.extension()
    if module is None:
        return {"built": False, "why": why}
    return {"built": True, **module.build_info}


def _missing(devices: list[str]) -> list[dict[str, str]]:
    """What would make more of it work here, each with the one line that gets it."""
    rows = []
    module, why = backends.extension()
    build = build_line("cuda" if "cuda" in devices else "cpu")
    if module is None:
        rows.append((why.partition("; ")[0], build))
    elif "cuda" in devices and not module.build_info["cuda"]:
        rows.append(("CUDA kernels: the extension was built without them", build_line("cuda")))
    if module is not None and module.build_info["torch"] != torch.__version__.partition("+")[0]:
        built = f"built for torch {module.build_info['torch']}, this is {torch.__version__}"
        rows.append((f"C++ extension: {built}", build))
    if "cuda" in devices and not backends.triton_available()[0]:
        rows.append(("Triton kernels: triton is not installed", "pip install triton"))
    return [{"what": what, "fix": fix} for what, fix in rows]


# ---- showing it --------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    console, make_table = console_and_table()
    versions = {k: v or "none" for k, v in report["versions"].items()}
    console.print("  ".join(f"{name} {version}" for name, version in versions.items()))
    extension = report["extension"]
    if extension["built"]:
        parts = "CPU and CUDA" if extension["cuda"] else "CPU only"
        console.print(
            f"extension: built for torch {extension['torch']}, "
            f"{extension['cpu_capability']} instructions, {parts}"
        )

    style: dict[str, Any] = {"title_justify": "left"}
    table = make_table("backend", "runs here", "why", title="Backends", **style)
    for name, found in report["backends"].items():
        table.add_row(name, "yes" if found["runs"] else "no", found["why"])
    console.print(table)

    for device, chosen in report["chosen"].items():
        title = f"Chosen for {report['dtype']} tensors on {device}"
        table = make_table("backend", "operations", "why", title=title, **style)
        together: dict[tuple[str, str], list[str]] = {}
        for operation, choice in chosen.items():
            key = (choice["backend"] or "none", choice["why"])
            together.setdefault(key, []).append(operation)
        for (name, why), operations in together.items():
            table.add_row(name, "\n".join(operations), why)
        console.print(table)

    _show_machine(report, console)
    table = make_table("extra", "installed", "to install it", title="Optional packages", **style)
    table.columns[-1].no_wrap = True  # a line to copy
    for extra in report["extras"]:
        packages = [f"{name} {version or 'none'}" for name, version in extra["installed"].items()]
        old = [text for text in extra["unmet"] if extra["installed"][_name(text)] is not None]
        packages += [f"too old or new: {text} is needed" for text in old]
        fix = "" if extra["complete"] else extra["fix"].replace("[", "\\[")  # no markup
        table.add_row(extra["name"], "\n".join(packages), fix)
    if report["extras"]:
        console.print(table)

    for row in report["missing"]:
        console.print(f"{row['what']}\n  to fix it: {row['fix']}", markup=False, soft_wrap=True)
    if report["error"]:
        console.print(f"error: {report['error']}", markup=False, soft_wrap=True)
    elif not report["missing"]:
        console.print("Everything that can work on this machine does.")


def _show_machine(report: dict[str, Any], console: Any) -> None:
    here = report["machine"]
    facts = [
        f"{here['usable_cores'] or here['cores']} cores, of which torch uses {here['threads']}"
    ]
    if here["memory_bytes"] is not None:
        free = here["available_bytes"]
        left = "" if free is None else f" ({gigabytes(free)} free)"
        facts.append(f"{gigabytes(here['memory_limit'] or here['memory_bytes'])} memory{left}")
    for gpu in here["gpus"]:
        sizes = f"{gigabytes(gpu['total_bytes'])} ({gigabytes(gpu['free_bytes'])} free)"
        facts.append(f"{gpu['name']} with {sizes}")
    console.print(f"This machine: {'; '.join(facts)}", markup=False, soft_wrap=True)
    for limit in report["limits"]:
        console.print(f"  limit: {limit}", markup=False, soft_wrap=True)
    console.print()


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~]", requirement)[0]
