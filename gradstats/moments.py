"""Second moments of a step that came in several backward passes, joined by Chan's formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradstats.interpose import Interposer


class SecondMoments:
    """Holds the gradients between micro-batches, so that the means between them can be compared.

    Each backward adds its own Σ(c_i − its mean)² to the probes. What is missing is the spread of the
    means: Σ_k n_k (m_k − m)², with m_k·n_k the growth of `p.grad` in backward k (Chan et al. 1979).
    """

    def __init__(self, interposer: Interposer, params: Callable[[], list[Tensor]]) -> None:
        self._interposer = interposer
        self._params = params
        self._snapshots: list[list[Tensor | None]] = []
        interposer.ledger.between = self._snapshot

    def _snapshot(self) -> None:
        """Runs between two backwards, or at the end of one. Once per delivered backward."""
        done = len({d.task for d in self._interposer.ledger.deliveries})
        if done > len(self._snapshots):
            grads = [p.grad for p in self._params()]
            self._snapshots.append([None if g is None else g.detach().clone() for g in grads])

    def take(self, batches: Sequence[int]) -> dict[str, Tensor]:
        """Σ(c_i − c̄)² of the whole step by parameter name, for those that delivered it.

        Empty where backwards overlapped, so that their means cannot be told apart.
        """
        snapshots, self._snapshots = self._snapshots[: len(batches) - 1], []
        found: dict[str, Tensor] = {}
        complete = len(snapshots) == len(batches) - 1
        for i, (name, param) in enumerate(zip(self._interposer.index, self._params(), strict=True)):
            probe = self._interposer.marks[name].m2
            assert probe is not None
            m2, probe.grad = probe.grad, None
            if m2 is None or not complete or param.grad is None:
                continue
            if len(batches) > 1:
                m2 = m2 + self._between(i, param.grad.to(m2.dtype), snapshots, batches)
            found[name] = m2
        return found

    @staticmethod
    def _between(
        i: int, total: Tensor, snapshots: list[list[Tensor | None]], batches: Sequence[int]
    ) -> Tensor:
        mean = total / max(sum(batches), 1)
        spread, before = torch.zeros_like(total), torch.zeros_like(total)
        for k, n in enumerate(batches):
            grown = snapshots[k][i] if k < len(snapshots) else total
            after = before if grown is None else grown.to(total.dtype)
            if n:
                spread += ((after - before) / n - mean).square() * n
            before = after
        return spread
