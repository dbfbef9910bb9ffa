"""What a log says of its training beside the rows: what seldom changes, and the step times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradstats.step_time import StepTime

__all__ = ["About"]


@dataclass(frozen=True)
class About:
    """None where the log does not say (those of earlier versions hold rows alone).

    `optimizer`: its class name. `confidence`, `method`, `calibration`, `calibration_usable`, `note`: of the
    noise scale, see `NoiseScale`. `sample`: what is counted, "example" or "token". `world_size`: processes
    that train together. `timing`: seconds of a step by batch size, as `gradstats.measure_step` found them;
    its sizes are in whole samples, `tokens_per_sample` each where tokens are counted.
    """

    optimizer: str | None = None
    confidence: float | None = None
    method: str | None = None
    calibration: float | None = None
    calibration_usable: bool | None = None
    note: str | None = None
    sample: str | None = None
    world_size: int | None = None
    tokens_per_sample: float | None = None
    timing: StepTime | None = None

    def joined(self, later: About) -> About:
        """Both; where they know the same, `later` counts."""
        return replace(self, **later._known())

    def to_dict(self) -> dict[str, Any]:
        """What is known, as JSON can hold it."""
        return {name: asdict(self)[name] for name in self._known()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> About:
        """From `to_dict()`. Raises ValueError, KeyError or TypeError for something else."""
        known = {name: state[name] for name in cls.__dataclass_fields__ if name in state}
        if known.get("timing") is not None:
            known["timing"] = timing = StepTime.from_dict(known["timing"])
            if not timing.seconds(timing.max_micro_batch_size) > 0:
                raise ValueError(f"a step takes {timing.seconds(timing.max_micro_batch_size)} s")
        ranks = known.get("world_size")
        if ranks is not None and (type(ranks) is not int or ranks < 1):
            raise ValueError(f"{ranks} processes")
        for name in ("confidence", "calibration", "tokens_per_sample"):
            if known.get(name) is not None:
                known[name] = float(known[name])
        return cls(**known)

    def _known(self) -> dict[str, Any]:
        return {
            name: value
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None
        }
