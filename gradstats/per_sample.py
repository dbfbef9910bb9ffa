"""`attach(method="per_sample")`: every sample's squared gradient norm, in the backward itself."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager

from torch import Tensor, nn

from gradstats import distributed, record
from gradstats.comm_hooks import ddp_of, require_means
from gradstats.errors import GradStatsError
from gradstats.install import install, uninstall
from gradstats.moments import SecondMoments
from gradstats.options import Options
from gradstats.order import Order
from gradstats.ranks import join_ranks, require_joined
from gradstats.self_check import SelfCheck
from gradstats.source import Source, Told
from gradstats.stats import GradStats
from gradstats.told import samples


class PerSample(Source):
    """Measures `model`, or the parameters `only`. Arguments as of `attach`."""

    def __init__(
        self, model: nn.Module, options: Options, only: Collection[str] | None = None
    ) -> None:
        self._options = options
        self._group = distributed.group_of(model, options.process_group)
        self._ddp = ddp_of(model)
        self._model = model = distributed.unwrapped(model)
        tokens = options.sample == "token"
        self.interposer = install(
            model, options.batch_dim, options.moments, options.fallback_bytes, tokens, only
        )
        self.names = tuple(self.interposer.index)
        self._sizes = tuple(p.numel() for n, p in model.named_parameters() if n in self.names)
        self._owners = [distributed.owner_of(model, name) for name in self.names]
        told_of = (options.every, options.moments, options.batch_dim, options.sample)
        settings = repr((*told_of, options.loss_reduction, self.interposer.dtype))
        try:
            self.ranks = join_ranks(model, self.interposer, self._group, settings, options.moments)
        except BaseException:
            uninstall(model)
            raise
        self._moments = None
        if options.moments:
            self._moments = SecondMoments(self.interposer, self.params, self.ranks)
        places = dict(zip(self.names, self._owners, strict=True))
        self._order = Order(self.interposer.ledger, places)
        self._self_check = SelfCheck(options.self_check) if options.self_check else None
        self._loss_scale = options.loss_scale()

    @property
    def size(self) -> int:
        """Processes that train together."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def enabled(self) -> bool:
        """Whether the steps to come are measured."""
        return self.interposer.enabled

    @enabled.setter
    def enabled(self, yes: bool) -> None:
        self.interposer.enabled = yes

    def measure(self) -> GradStats:
        """The record of what was propagated backward since the last call; see `Monitor.step`."""
        interposer = self.interposer
        names, params = self.names, self.params()
        require_joined(self.ranks, self._group, params)
        deliveries, reasons = interposer.take()
        try:
            require_means(self._ddp)
            self._order.require_intact()
            if self._self_check is not None:
                self._self_check.finish()
            groups = record.group(deliveries, reasons)
            scale = self._loss_scale.factor(groups[0].rows) if self._loss_scale else None
        except GradStatsError:
            self._give_up(params)
            raise
        summed, per_layer = self._options.summed, self._options.per_layer
        joined = None
        if self.ranks is None:
            m2 = self._moments.take([g.batch for g in groups], None) if self._moments else {}
            if not reasons and scale is None:
                known = names, self._sizes, params
                shortcuts = interposer.shortcuts
                stats = record.at_once(*known, groups, summed, per_layer, m2, shortcuts)
                if stats is not None:
                    return stats
            local = record.gather(names, params, groups, reasons)
        else:
            absent = self.ranks.absent(params)
            local = record.gather(names, params, groups, reasons, absent)
            joined = self.ranks.join(params, local)
            m2 = self._moments.take([g.batch for g in groups], joined) if self._moments else {}
            error = self.ranks.finish(joined) if joined is not None else None
            if error is not None:
                raise error
        return record.build(names, params, local, joined, reasons, summed, per_layer, m2, scale)

    def _give_up(self, params: list[Tensor]) -> None:
        """No statistics here: forget what belongs to no step, and let no other rank wait for it."""
        joined = self.ranks.join_failed(params) if self.ranks else None
        if self._moments:
            self._moments.take([], joined)
        if self.ranks:
            self.ranks.forget()

    def params(self) -> list[Tensor]:
        """The parameters in row order, as they are now: FSDP and others replace the objects."""
        return [owner[key] for owner, key in self._owners]

    def require_unchanged(self) -> None:
        """Raises OrderError where the gradients that were read had been changed before."""
        self._order.require_unchanged()

    def samples(self, told: Told) -> AbstractContextManager[None]:
        """See `Monitor.samples`."""
        return samples(self.interposer, told, self._moments is not None)

    def fallbacks(self) -> dict[str, tuple[int, str]]:
        """See `Monitor.fallbacks`."""
        it = self.interposer
        return {
            name: (plan.cost(it.batch), it.fallbacks[path].reason)
            for path, plan in it.plans.items()
            if path in it.fallbacks
            for name in plan.names()
        }

    def close(self) -> None:
        """Leave the model as it was."""
        if self._self_check is not None:
            self._self_check.close()
        if self.ranks is not None:
            self.ranks.close()
        uninstall(self._model)
