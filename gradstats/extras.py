"""Which optional packages are installed, by extra, as the installed package's own metadata names them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gradstats.errors import GradStatsError

__all__ = ["Extra", "extras"]

PACKAGE = "gradstats"
DEVELOPMENT = ("test", "lint", "peers", "docs")  # for work on gradstats itself


@dataclass(frozen=True)
class Extra:
    """An extra: the version that is installed of each of its packages, None where none is.

    `unmet`: requirements that are not met, as they are written.
    """

    name: str
    installed: dict[str, str | None]
    unmet: tuple[str, ...]

    @property
    def fix(self) -> str:
        """The line that installs it."""
        return f"pip install '{PACKAGE}[{self.name}]'"

    def to_dict(self) -> dict[str, Any]:
        """The fields, whether it is complete, and what installs it."""
        fields = {"name": self.name, "installed": self.installed, "unmet": list(self.unmet)}
        return {**fields, "complete": not self.unmet, "fix": self.fix}


def extras(lines: list[str] | None = None) -> list[Extra]:
    """Every extra but those for development. `lines`: requirements (default: of the installed gradstats).

    Raises GradStatsError where the package `packaging`, which reads requirements, is not installed.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError as error:
        raise GradStatsError(
            f"the report on extras needs packaging ({error}); run `pip install 'gradstats[cli]'`"
        ) from error
    if lines is None:
        try:
            lines = metadata.requires(PACKAGE) or []
        except metadata.PackageNotFoundError:  # run from a folder, without being installed
            lines = []
    wanted: dict[str, list[Any]] = {}
    for line in lines:
        for name in re.findall(r"extra *== *[\"']([^\"']+)[\"']", line):
            wanted.setdefault(name, []).append(Requirement(line))
    return [_extra(name, wanted) for name in wanted if name not in DEVELOPMENT]


def _extra(name: str, wanted: dict[str, list[Any]]) -> Extra:
    installed: dict[str, str | None] = {}
    unmet = []
    for requirement in _flat(name, wanted, set()):
        version = _version(requirement.name)
        installed[requirement.name] = version
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier}")
    return Extra(name, installed, tuple(dict.fromkeys(unmet)))


def _flat(name: str, wanted: dict[str, list[Any]], seen: set[str]) -> list[Any]:
    """The requirements of an extra, with those of the extras that it names."""
    if name in seen:
        return []
    seen.add(name)
    found = []
    for requirement in wanted.get(name, ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": name}):
            continue  # for another system, or another Python
        if requirement.name == PACKAGE:
            found += [r for other in sorted(requirement.extras) for r in _flat(other, wanted, seen)]
        else:
            found.append(requirement)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
