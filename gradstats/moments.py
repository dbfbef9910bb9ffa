"""Second moments of a step that came in several backward passes, joined by Chan's formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradstats.distributed import whole
from gradstats.interpose import Interposer
from gradstats.ranks import Ranks
from gradstats.record import Joined


class SecondMoments:
    """Holds the gradients between micro-batches, so that the means between them can be compared.

    Each backward adds its own Σ(c_i − its mean)² to the probes. What is missing is the spread of the
    means: Σ_k n_k (m_k − m)², with m_k·n_k the growth of `p.grad` in backward k (Chan et al. 1979). Where
    several ranks average their gradients, `p.grad` is not this process's sum: `Ranks` keeps that.
    """

    def __init__(
        self,
        interposer: Interposer,
        params: Callable[[], list[Tensor]],
        ranks: Ranks | None = None,
    ) -> None:
        self._interposer = interposer
        self._params = params
        self._ranks = ranks
        self._snapshots: list[list[Tensor | None]] = []
        interposer.ledger.between = self._snapshot

    def _snapshot(self) -> None:
        """Runs between two backwards, or at the end of one. Once per delivered backward."""
        done = len({d.task for d in self._interposer.ledger.deliveries})
        if done > len(self._snapshots):
            sums = (
                [p.grad for p in self._params()] if self._ranks is None else self._ranks.own_sums()
            )
            self._snapshots.append([None if g is None else g.detach().clone() for g in sums])

    def take(self, batches: Sequence[int], joined: Joined | None = None) -> dict[str, Tensor]:
        """Σ(c_i − c̄)² of the whole step by parameter name, for those that delivered it.

        Empty where backwards overlapped, so that their means cannot be told apart. `joined`: what
        all ranks found; the sums over them are one more collective, of the weights' size.
        """
        snapshots, self._snapshots = self._snapshots[: len(batches) - 1], []
        found: dict[str, Tensor] = {}
        complete = len(snapshots) == len(batches) - 1
        params = self._params()
        for i, (name, param) in enumerate(zip(self._interposer.index, params, strict=True)):
            probe = self._interposer.marks[name].m2
            assert probe is not None
            m2, probe.grad = probe.grad, None
            if joined is not None:
                if param.requires_grad:
                    own = self._about_common_mean(i, param, snapshots, batches, joined)
                    own = own if m2 is None else own + m2
                    found[name] = own if complete else own.fill_(torch.nan)
                continue
            if m2 is None or not complete or param.grad is None:
                continue
            if len(batches) > 1:
                total = param.grad.to(m2.dtype)
                mean = total / max(sum(batches), 1)
                m2 = m2 + self._between(i, total, mean, snapshots, batches)
            found[name] = m2
        if self._ranks is None:
            return found
        kept = [
            n for n, p in zip(self._interposer.index, params, strict=True) if p.grad is not None
        ]
        found = self._ranks.add_up(found)
        return {name: found[name] for name in kept if name in found}

    def _about_common_mean(
        self,
        i: int,
        param: Tensor,
        snapshots: list[list[Tensor | None]],
        batches: Sequence[int],
        joined: Joined,
    ) -> Tensor:
        """What the means of this rank's backwards add to the spread about the mean of all ranks."""
        assert self._ranks is not None
        dtype = self._interposer.dtype
        mean = torch.zeros(param.shape, dtype=dtype, device=self._interposer.device)
        if param.grad is not None:
            scale = joined.ranks / joined.num_samples.clamp_min(1)
            mean = whole(param.grad.detach()).to(dtype) * scale.to(dtype)
        total = self._ranks.own_sums()[i]
        total = torch.zeros_like(mean) if total is None else total.to(dtype)
        return self._between(i, total, mean, snapshots, batches)

    @staticmethod
    def _between(
        i: int,
        total: Tensor,
        mean: Tensor,
        snapshots: list[list[Tensor | None]],
        batches: Sequence[int],
    ) -> Tensor:
        """Σ_k n_k (m_k − mean)², with `total` what all of this process's backwards added up to."""
        spread, before = torch.zeros_like(total), torch.zeros_like(total)
        for k, n in enumerate(batches):
            grown = snapshots[k][i] if k < len(snapshots) else total
            after = before if grown is None else grown.to(total.dtype)
            if n:
                spread += ((after - before) / n - mean).square() * n
            before = after
        return spread
