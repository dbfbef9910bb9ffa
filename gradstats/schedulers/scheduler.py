"""The class that carries a policy out: when to decide, bounds, whole micro-batches, all ranks alike."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from gradstats.agreement import decide_on_first_rank
from gradstats.cadence import sparse
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, require, whole
from gradstats.scaling import BatchScaling
from gradstats.schedulers.policies import Policy, Seen

__all__ = ["BatchSizeChange", "BatchSizeScheduler"]

FIRST = 16  # steps before which no noise scale has an interval
DENSE = 8  # decisions in each doubling: to read the noise scale of 10,000 steps takes some 8 ms


class Loader(Protocol):
    """What a scheduler changes: `StepLoader`, `GroupedLoader`, or anything with these."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    dataset_size: int | None
    samples: int


class Measured(Protocol):
    """Where a noise scale comes from: a `Monitor`."""

    def noise_scale(self) -> NoiseScale: ...


@dataclass(frozen=True)
class BatchSizeChange:
    """From optimizer step `step` on, after `samples` samples, steps are of `batch_size` samples."""

    step: int
    samples: int
    batch_size: int
    accumulation_steps: int


class BatchSizeScheduler:
    """Sets a loader's accumulation steps, and with them the learning rate, as a policy asks.

    ```python
    scaling = gradstats.BatchScaling(optimizer, batch_size=loader.batch_size, rule="noise")
    scheduler = BatchSizeScheduler(noise_scale, loader, monitor=monitor, scaling=scaling)
    ...
    optimizer.step()
    scheduler.step()
    ```
    Args:
        policy: a function of `Seen`, such as those of `gradstats.schedulers`.
        loader: whose `accumulation_steps` it sets, from the next step on.
        monitor: for policies that go by the noise scale, and for scaling's rule "noise".
        scaling: told the batch size and noise scale of every decision.
        min_batch_size, max_batch_size: bounds, in samples over all ranks (default: one micro-batch per
            rank, and the dataset).
        every: optimizer steps from one decision to the next (default: 1; with a monitor, whose noise scale
            takes a while to read and moves with the logarithm of the steps, from the 16th on 8 in each
            doubling of their number, and one out of 64).
        cooldown: optimizer steps for which the size stays after a change.
        tokens_per_sample: of the loader's samples, where the monitor was attached with
            ``sample="token"``: batch sizes stay in samples, and the noise scale is brought to them.
        process_group: the ranks that decide alike (default: all).

    Where several processes train together, the first rank decides and sends the others what it decided,
    so all must call `step`: one small broadcast every `every` steps. Otherwise nothing waits for
    another rank, and the device is waited for in deciding steps only.

    Raises InvalidArgumentError for contradictory bounds, and where the policy needs what is missing.
    """

    def __init__(
        self,
        policy: Policy,
        loader: Loader,
        *,
        monitor: Measured | None = None,
        scaling: BatchScaling | None = None,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        every: int | None = None,
        cooldown: int = 0,
        tokens_per_sample: float | None = None,
        process_group: Any = None,
    ) -> None:
        lacking = [name for name in Loader.__annotations__ if not hasattr(loader, name)]
        if lacking:
            raise InvalidArgumentError(
                f"loader={loader!r} has no {', '.join(lacking)}: pass a gradstats.StepLoader, or what else "
                "can change its accumulation_steps"
            )
        if every is not None or monitor is None:
            every = whole("every", every, default=1)
        for name, bound in (("min_batch_size", min_batch_size), ("max_batch_size", max_batch_size)):
            whole(name, bound, default=1)
        require(cooldown >= 0, "cooldown", cooldown, "pass a number of steps of at least 0")
        in_tokens = getattr(monitor, "sample", "example") == "token"
        if in_tokens != (tokens_per_sample is not None):
            raise InvalidArgumentError(
                f"tokens_per_sample={tokens_per_sample} with a monitor that counts "
                f"{'tokens' if in_tokens else 'examples'}: pass it where, and only where, the monitor "
                'was attached with sample="token"'
            )
        self._tokens = 1.0 if tokens_per_sample is None else tokens_per_sample
        require(self._tokens > 0, "tokens_per_sample", tokens_per_sample, "pass a number above 0")
        self._policy, self._loader = policy, loader
        self._monitor, self._scaling, self._group = monitor, scaling, process_group
        unit, most = loader.micro_batch_size * loader.world_size, loader.dataset_size
        self.min_batch_size = unit if min_batch_size is None else min_batch_size
        self.max_batch_size = max_batch_size
        if most is not None:
            given = max_batch_size
            require(
                given is None or given <= most, "max_batch_size", given, f"the dataset has {most}"
            )
            self.max_batch_size = most if given is None else given
        self.every, self.cooldown = every, cooldown
        self.base_batch_size = self.batch_size if scaling is None else scaling.base_batch_size
        self.changes: list[BatchSizeChange] = []
        self._steps = self._base_steps = 0
        self._peak = self._learning_rate()
        bounds = (self.min_batch_size, self.max_batch_size)
        low, high = self._bounds()
        parts = f"a multiple of micro_batch_size × world_size = {unit} must lie between"
        require(low <= high, "(min_batch_size, max_batch_size)", bounds, parts)
        within = low <= loader.accumulation_steps <= high
        require(within, "(min_batch_size, max_batch_size)", bounds, f"{self.batch_size} is outside")
        if scaling is not None and scaling.rule == "noise" and monitor is None:
            raise InvalidArgumentError('scaling has rule "noise": pass monitor= as well')
        self._wanted(self._see())  # what it lacks is said now, not in the middle of training

    @property
    def batch_size(self) -> int:
        """Samples of the next step, over all ranks."""
        loader = self._loader
        return loader.micro_batch_size * loader.world_size * loader.accumulation_steps

    def step(self) -> BatchSizeChange | None:
        """After `optimizer.step()` (and a learning-rate scheduler's): decides, where it is time to.

        Returns the change that holds from the next step on, if there is one. A noise scale that is
        unknown, or too uncertain, changes nothing.
        """
        self._steps += 1
        self._peak = max(self._peak, self._learning_rate())
        if not self._is_due():
            return None
        number, noise = decide_on_first_rank(self._decide, self._group)
        changed = number != self._loader.accumulation_steps
        self._loader.accumulation_steps = number
        if self._scaling is not None:
            self._scaling.update(self.batch_size, noise)
        if not changed:
            return None
        self.changes.append(
            BatchSizeChange(self._steps, self._loader.samples, self.batch_size, number)
        )
        return self.changes[-1]

    def base_steps(self) -> int:
        """How often to step a learning-rate schedule now, for it to go by samples and not by steps.

        A schedule that was laid out for steps of the base batch size then takes the same number of
        samples, whatever the batch: ``for _ in range(scheduler.base_steps()): lr_scheduler.step()``.
        The steps it gave count as taken.
        """
        due = self._loader.samples // self.base_batch_size - self._base_steps
        self._base_steps += due
        return due

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. The loader and the monitor have states of their own."""
        return {
            "version": 1,
            "base_batch_size": self.base_batch_size,
            "batch_size": self.batch_size,
            "steps": self._steps,
            "base_steps": self._base_steps,
            "peak": self._peak,
            "changes": [asdict(change) for change in self.changes],
            "scaling": None if self._scaling is None else self._scaling.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, with as many micro-batches as come nearest to its batch size.

        Raises InvalidArgumentError for the state of a run with another base batch size, or with a
        scaling where this has none (and the reverse).
        """
        own = (1, self.base_batch_size, self._scaling is not None)
        seen = (
            state.get("version"),
            state.get("base_batch_size"),
            state.get("scaling") is not None,
        )
        if own != seen:
            raise InvalidArgumentError(
                f"the state has (version, base_batch_size, scaled) = {seen}, this scheduler {own}; make "
                "it with the arguments of the run that is resumed"
            )
        self._steps, self._base_steps = state["steps"], state["base_steps"]
        self._peak = state["peak"]
        self.changes = [BatchSizeChange(**change) for change in state["changes"]]
        self._loader.accumulation_steps = self._whole(state["batch_size"])
        if self._scaling is not None:
            self._scaling.load_state_dict(state["scaling"])
            if self.batch_size != state["batch_size"]:  # with other ranks or micro-batches
                self._scaling.update(self.batch_size)

    # ---- deciding --------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        if self.every is None:
            return self._steps >= FIRST and sparse(self._steps, DENSE)
        return self._steps % self.every == 0

    def _decide(self) -> tuple[int, float | None]:
        """Accumulation steps, and the noise scale for the learning rate."""
        seen, now = self._see(), self._loader.accumulation_steps
        cooling = bool(self.changes) and self._steps - self.changes[-1].step < self.cooldown
        wanted = math.nan if cooling else self._wanted(seen)
        number = now if math.isnan(wanted) or wanted == seen.batch_size else self._whole(wanted)
        return number, None if seen.noise is None else seen.noise.value

    def _see(self) -> Seen:
        scaling = self._scaling
        return Seen(
            batch_size=self.batch_size,
            base_batch_size=self.base_batch_size,
            step=self._steps,
            samples=self._loader.samples,
            noise=self._noise(),
            decay=None if scaling is None else self._decay(),
            rule=None if scaling is None else scaling.rule,
        )

    def _noise(self) -> NoiseScale | None:
        """In the loader's samples."""
        if self._monitor is None:
            return None
        return self._monitor.noise_scale().per(self._tokens)

    def _wanted(self, seen: Seen) -> float:
        found = self._policy(seen)
        require(isinstance(found, numbers.Real), "policy", found, "it must return a batch size")
        wanted = float(found)
        require(
            not wanted <= 0, "policy", wanted, "it must return a batch size above 0, or NaN to stay"
        )
        return wanted

    def _learning_rate(self) -> float:
        """The schedule's, unscaled; 0 where there is none to read."""
        return (
            0.0 if self._scaling is None else float(self._scaling.optimizer.param_groups[0]["lr"])
        )

    def _decay(self) -> float:
        return self._learning_rate() / self._peak if self._peak else 1.0  # a warm-up begins at 0

    def _bounds(self) -> tuple[int, float]:
        unit, most = self._loader.micro_batch_size * self._loader.world_size, self.max_batch_size
        return -(-self.min_batch_size // unit), math.inf if most is None else most // unit

    def _whole(self, batch_size: float) -> int:
        """Micro-batches per rank nearest to a batch size, within the bounds."""
        low, high = self._bounds()
        near = max(
            low, min(high, batch_size / (self._loader.micro_batch_size * self._loader.world_size))
        )
        return self._loader.accumulation_steps if math.isinf(near) else max(1, round(near))
