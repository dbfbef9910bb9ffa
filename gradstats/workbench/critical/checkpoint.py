"""A training's state in a file: the state_dicts of its model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gradstats.errors import InvalidArgumentError, first_line
from gradstats.workbench.critical.branches import optimizer_of
from gradstats.workbench.workload import Workload

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, workload: Workload) -> None:
    """Write the file that `load_checkpoint` reads.

    Raises InvalidArgumentError where it cannot be written.
    """
    optimizer = optimizer_of(workload)
    states = {"model": workload.model.state_dict(), "optimizer": optimizer.state_dict()}
    draft = path.with_name(f".{path.name}")
    try:
        torch.save(states, draft)
        draft.replace(path)
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        raise InvalidArgumentError(
            f"{path} cannot be written ({first_line(error)}); name another file, or make room"
        ) from error


def load_checkpoint(path: Path, workload: Workload) -> None:
    """Load the state_dicts of "model" and "optimizer" from a file of torch.save.

    Raises InvalidArgumentError where they are not there, or are of something else.
    """
    try:
        states = torch.load(path, map_location=workload.device, weights_only=True)
    except Exception as error:
        raise InvalidArgumentError(
            f"checkpoint {path} cannot be read ({first_line(error)}); pass a file of "
            'torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, …)'
        ) from error
    if not isinstance(states, Mapping) or not {"model", "optimizer"} <= set(states):
        seen = ", ".join(map(str, states)) if isinstance(states, Mapping) else type(states).__name__
        raise InvalidArgumentError(
            f'checkpoint {path} holds {seen}; it must hold "model" and "optimizer", their state_dicts'
        )
    try:
        workload.model.load_state_dict(states["model"])
        optimizer_of(workload).load_state_dict(states["optimizer"])
    except Exception as error:
        raise InvalidArgumentError(
            f"checkpoint {path} is not of this model and optimizer ({first_line(error)})"
        ) from error
