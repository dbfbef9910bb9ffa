"""Optimizers that use the statistics: pure updates of tensors, each with a thin class.

`LARS` and `LAMB` are those of the package pytorch-optimizer (``pip install "gradstats[optim]"``),
loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from gradstats.errors import BackendError
from gradstats.optim.adascale import AdaScale, adascale_gain, sgd_update_
from gradstats.optim.per_sample_adam import PerSampleAdam, adam_update_

__all__ = [
    "LAMB",
    "LARS",
    "AdaScale",
    "PerSampleAdam",
    "adam_update_",
    "adascale_gain",
    "sgd_update_",
]

_LAYERWISE = {"LARS": "LARS", "LAMB": "Lamb"}  # their names there


def __getattr__(name: str) -> Any:
    if name not in _LAYERWISE:
        raise AttributeError(f"module 'gradstats.optim' has no attribute {name!r}")
    try:
        library = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise BackendError(
            f"gradstats.optim.{name} needs the package pytorch-optimizer, which cannot be imported "
            f'here ({error}); install it with pip install "gradstats[optim]"'
        ) from error
    return getattr(library, _LAYERWISE[name])
