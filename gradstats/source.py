"""What a method of `attach` is to the monitor."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from gradstats.estimators import NoiseScale
from gradstats.stats import GradStats


class Source(Protocol):
    """Measures the steps of one model: built by `attach`, from the model and its `Options`."""

    enabled: bool  # whether the steps to come are measured

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those that it measures, by which a state is known to be of the same model."""
        ...

    @property
    def size(self) -> int:
        """Processes that train together."""
        ...

    def measure(self) -> GradStats:
        """The record of what was propagated backward since the last call; see `Monitor.step`."""
        ...

    def require_unchanged(self) -> None:
        """Raises OrderError where the gradients that were read had been changed before."""
        ...

    def samples(
        self,
        ids: Tensor | None,
        num_samples: int | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> AbstractContextManager[None]:
        """See `Monitor.samples`."""
        ...

    def adjust(self, noise: NoiseScale) -> NoiseScale:
        """The smoothed noise scale, with what the method has to say of it."""
        ...

    def fallbacks(self) -> dict[str, tuple[int, str]]:
        """See `Monitor.fallbacks`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the method itself remembers, as plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...
