"""`attach(method="micro_batch")`: each micro-batch's gradient against that of the whole step.

For any model, also where no sample has a gradient of its own (BatchNorm in training mode). What a
backward adds to `p.grad` is that micro-batch's part; a copy of `p.grad` is held while there are more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradstats import distributed
from gradstats.errors import AttachError, NoStatisticsError
from gradstats.options import Options
from gradstats.order import Order
from gradstats.part_source import PartSource
from gradstats.parts import Call, sq_norms
from gradstats.probes import Delivery, Ledger, at_the_end
from gradstats.record import held, numbers_on
from gradstats.stats import GradStats


class MicroBatches(PartSource):
    """A part is what one backward() propagates, of one forward or several."""

    method = "micro_batch"
    what = "micro-batches"

    def __init__(self, model: nn.Module, options: Options) -> None:
        if options.process_group is not distributed.ALONE and distributed.initialised():
            raise AttachError(
                'method="micro_batch" is for one process: where several average their gradients, p.grad '
                'does not grow by this one\'s micro-batches. Use method="ranks", which compares the '
                'ranks\' gradients, or method="per_sample".'
            )
        super().__init__(model, options)
        self._ledger = Ledger()  # a delivery is a part; its rows are (P,), once the part is over
        self._order = Order(self._ledger, self.places)
        self._before: list[Tensor | None] = []  # p.grad when the last part began
        self._again = False
        self._several = False  # some step had more than one part

    def reached(self, call: Call, task: int, again: bool) -> None:
        self._again |= again
        open_ = self._ledger.deliveries[-1] if self._ledger.deliveries else None
        if open_ is not None and open_.task == task:
            open_.batch += call.size
            return
        self._close_part()
        grads = [p.grad for p in self.params()]
        self._before = [None if g is None else held(g.detach()).clone() for g in grads]
        self._ledger.deliveries.append(Delivery(call.size, task))
        if self._ledger.settled is not None:
            at_the_end(self._ledger.settled)

    def _close_part(self) -> None:
        """What `p.grad` has grown by since the last part began is that part's gradient."""
        if not self._ledger.deliveries or self._ledger.deliveries[-1].rows is not None:
            return
        grown: list[Tensor | None] = []
        for param, before in zip(self.params(), self._before, strict=True):
            now = None if param.grad is None else held(param.grad.detach())
            if now is not None and before is not None:
                wide = torch.promote_types(now.dtype, torch.float32)
                now = now.to(wide) - before.to(wide)
            grown.append(now)
        self._ledger.deliveries[-1].rows = sq_norms(grown, self.device)
        self._before = []

    def require_unchanged(self) -> None:
        """Raises OrderError where the gradients that were read had been changed before."""
        self._order.require_unchanged()

    def measure(self) -> GradStats:
        try:
            self._order.require_intact()
            return self._measured()
        finally:
            self._ledger.deliveries.clear()
            self._before, self._again = [], False

    def _measured(self) -> GradStats:
        self._close_part()
        found = self._ledger.deliveries
        if not found:
            raise NoStatisticsError(
                "step() found no backward pass through the attached model since the last step(). Call it "
                "once per optimizer step, after loss.backward(); attach to the very module that is "
                "called (the result of torch.compile, not what went into it), whose outputs must be "
                "tensors, or tuples, lists or mappings of them."
            )
        if self._again:
            raise NoStatisticsError(
                "backward() ran twice through one forward in this step, so which samples added what to "
                "p.grad is not known. Add the losses up and call backward() once for each forward."
            )
        if len(found) < 2 and not self._several:
            raise NoStatisticsError(
                'method="micro_batch" compares the micro-batches of a step, and this one had a single '
                'backward() between two calls of step(). Accumulate at least two, or use method="per_sample".'
            )
        self._several |= len(found) >= 2
        sizes = numbers_on(tuple([d.batch for d in found]), self.device)
        rows = torch.stack([d.rows for d in found if d.rows is not None], 1)
        grads = sq_norms([p.grad for p in self.params()], self.device)
        ok = torch.ones(len(self.names), dtype=torch.bool, device=self.device)
        return self.build(sizes, rows, grads, ok)
