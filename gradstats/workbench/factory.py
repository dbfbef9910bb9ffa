"""Finding the function that a command line names as `module:factory`, and calling it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from gradstats.errors import InvalidArgumentError, first_line

__all__ = ["call_factory", "find_factory"]


def find_factory(target: str, gives: str) -> Callable[[], Any]:
    """The function that `target` names; `gives` says in errors what it must return.

    Raises InvalidArgumentError where `target` is not of that form, or cannot be imported.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise InvalidArgumentError(
            f"{target!r} is not of the form module:factory, as in my_project.training:example"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder the command runs in, as `python -m` has it
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidArgumentError(
            f"module {module_name!r} cannot be imported ({first_line(error)}). Run in the folder that "
            "holds it, and name it as `import` would, without .py."
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        seen = "is not there" if factory is None else f"is a {type(factory).__name__}"
        raise InvalidArgumentError(
            f"{name!r} in module {module_name!r} {seen}; it must be a function without arguments "
            f"that returns {gives}"
        )
    return factory  # type: ignore[no-any-return]


def call_factory(target: str, gives: str) -> Any:
    """What the function that `target` names returns.

    Raises InvalidArgumentError where it cannot be found, or fails.
    """
    factory = find_factory(target, gives)
    try:
        return factory()
    except Exception as error:
        raise InvalidArgumentError(
            f"{target}() failed: {first_line(error)}. It is called without arguments and must return "
            f"{gives}."
        ) from error
