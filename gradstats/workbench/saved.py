"""Files that the tools write and read: one JSON object each, whole or not there."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gradstats.errors import InvalidArgumentError

__all__ = ["environment", "plain", "read", "require_writable", "write", "write_text"]

VERSION = 1


def write(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `content` as the object ``{"kind": "gradstats <kind>", "version": 1, …}``.

    The file is replaced at once when all of it is on the disk: a crash or a full disk leaves the one
    that was there. Numbers that JSON does not have (infinite, NaN) become null.

    Raises InvalidArgumentError where the file cannot be written.
    """
    whole = {"kind": f"gradstats {kind}", "version": VERSION, **content}
    write_text(path, json.dumps(plain(whole), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of text; it is replaced at once when all of it is on the disk.

    What is no regular file (a device, a pipe) is written to as it is. Raises InvalidArgumentError where
    it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if _special(path):
            path.write_text(text, "utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} cannot be written ({error.strerror}); name another file, or make room"
        ) from error
    finally:  # also where Ctrl-C comes in between
        with contextlib.suppress(OSError):  # where its folder cannot be, nor can it
            draft.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise InvalidArgumentError where `write` could not write here: to be told before long work."""
    if _special(path) and os.access(path, os.W_OK):
        return
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"no file can be made in {folder}"
        raise InvalidArgumentError(f"{path} cannot be written ({why}); name another file")


def _special(path: Path) -> bool:
    """Whether something is there that must not be replaced by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read(path: Path, *kinds: str) -> dict[str, Any]:
    """The object in a file that `write` made, of one of these kinds.

    Raises InvalidArgumentError where the file cannot be read, was cut short, or holds something else.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidArgumentError(f"{path} cannot be read ({why})") from error
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(
            f"{path} is not JSON from line {error.lineno} on; was it cut short, or changed by hand?"
        ) from error
    wanted = [f"gradstats {kind}" for kind in kinds]
    found = found if isinstance(found, dict) else {}
    seen = found.get("kind")
    if seen not in wanted:
        raise InvalidArgumentError(
            f"{path} holds {'no ' if seen is None else ''}{seen or 'result of gradstats'}; what is needed is "
            f"a file of {' or '.join(wanted)}"
        )
    if found.get("version") != VERSION:
        raise InvalidArgumentError(
            f"{path} is of version {found.get('version')}, and this gradstats reads version {VERSION}"
        )
    return dict(found)


def plain(value: Any) -> Any:
    """The same as JSON can hold it: no infinite numbers or NaN, keys of text, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def environment(*packages: str) -> dict[str, Any]:
    """What figures depend on besides the code: date, versions, processor, threads, load, GPU."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("gradstats", "torch", "numpy", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    """The CPU's model, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()
