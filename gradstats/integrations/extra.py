"""Libraries that are installed as extras."""

from __future__ import annotations

import importlib
from typing import Any

from gradstats.errors import BackendError

__all__ = ["library"]


def library(name: str, extra: str) -> Any:
    """The module `name`. Raises BackendError with the line that installs it where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"gradstats.integrations.{extra} needs the package {name.split('.')[0]}, which cannot be "
            f"imported here ({error}); install it with pip install 'gradstats[{extra}]'"
        ) from error
