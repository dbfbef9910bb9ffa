"""What a method of `attach` is to the monitor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from gradstats.estimators import NoiseScale
from gradstats.stats import GradStats


class Told(NamedTuple):
    """What a user says of the samples of a forward: the arguments of `Monitor.samples`."""

    ids: Tensor | None
    num_samples: int | None
    cu_seqlens: Tensor | None
    mask: Tensor | None


class Source(ABC):
    """Measures the steps of one model: built by `attach`, from the model and its `Options`."""

    enabled: bool  # whether the steps to come are measured
    names: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those that it measures, by which a state is known to be of the same model."""
        return self.names

    @property
    def size(self) -> int:
        """Processes that train together."""
        return 1

    @abstractmethod
    def measure(self) -> GradStats:
        """The record of what was propagated backward since the last call; see `Monitor.step`."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raises OrderError where the gradients that were read had been changed before."""

    @abstractmethod
    def samples(self, told: Told) -> AbstractContextManager[None]:
        """See `Monitor.samples`."""

    def adjust(self, noise: NoiseScale) -> NoiseScale:
        """The smoothed noise scale, with what the method has to say of it."""
        return noise

    def fallbacks(self) -> dict[str, tuple[int, str]]:
        """See `Monitor.fallbacks`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the method itself remembers, as plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from `state_dict()`."""

    @abstractmethod
    def close(self) -> None:
        """Leave the model as it was."""
