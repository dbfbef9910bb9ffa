"""`attach(method="ranks")`: each rank's gradient before DistributedDataParallel averages it, and after.

For any model, also where no sample has a gradient of its own. A step holds one collective of two
numbers per parameter and two more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradstats import distributed
from gradstats.comm_hooks import ddp_of, require_means
from gradstats.distributed import AGREEMENT, APART, FAILED, lost_step
from gradstats.errors import AttachError, GradStatsError, NoStatisticsError, OrderError
from gradstats.options import Options
from gradstats.part_source import PartSource
from gradstats.parts import Call, sq_norms
from gradstats.record import flags_on, held
from gradstats.stats import GradStats

UNSEEN = "it was frozen when attach() was called, so this rank's own gradient was not seen"


class RankMeans(PartSource):
    """A part is what one rank propagated, in any number of micro-batches under `no_sync()`."""

    method = "ranks"
    what = "ranks' batches"

    def __init__(self, model: nn.Module, options: Options) -> None:
        inside = getattr(model, "_orig_mod", model)
        if not isinstance(inside, DistributedDataParallel):
            raise AttachError(
                'method="ranks" compares gradients before and after DistributedDataParallel averages '
                f"them, and the model is a {type(inside).__name__}. Wrap it first, then attach to the "
                'wrapper; under fully_shard use method="per_sample".'
            )
        self._group = distributed.group_of(model, options.process_group)
        self._ranks = torch.distributed.get_world_size(self._group)
        if self._ranks < 2:
            raise AttachError(
                'method="ranks" needs at least two processes, and this group has one. Use '
                'method="per_sample", or "micro_batch" with gradient accumulation.'
            )
        super().__init__(model, options)
        self._ddp = ddp_of(model)
        self._calls: list[Call] = []
        self._error: str | None = None
        self._own: list[Tensor | None] = [None] * len(self.names)  # 0-d: squared norms
        self._seen: tuple[Tensor, int] | None = None  # a gradient after the backward, its version
        self._hooks: list[Any] = []
        params = self.params()
        self._watched = [p.requires_grad for p in params]
        sizes = {i: p.numel() for i, p in enumerate(params) if p.requires_grad}
        self._smallest = min(sizes, key=lambda i: sizes[i])
        try:
            told = (options.every, options.batch_dim, options.loss_reduction, options.weighting)
            shapes = [(n, tuple(p.shape)) for n, p in zip(self.names, params, strict=True)]
            described = repr((self.method, told, shapes, self._watched))
            distributed.require_alike(described, self._ranks, self._group, self.device)
        except BaseException:
            self.close()
            raise
        for row, param in enumerate(params):
            if param.requires_grad:
                self._hooks.append(param.register_hook(partial(self._arrive, row)))

    @property
    def size(self) -> int:
        return self._ranks

    def reached(self, call: Call, task: int, again: bool) -> None:
        if again:
            self._error = (
                "backward() ran twice through one forward. Add the losses up and call it once"
            )
        if any(c.synchronised and c.task != task for c in self._calls):
            self._error = (
                "gradients were averaged in more than one backward of a step, so a rank's own sum is not "
                "known. Run all but the last under no_sync()"
            )
        self._calls.append(call)
        # The averaging ends in a callback too, that is queued later than this one.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._look))

    def _look(self) -> None:
        grad = self.params()[self._smallest].grad
        self._seen = None if grad is None else (grad, grad._version)

    def _arrive(self, row: int, grad: Tensor) -> None:
        """Runs before a gradient is added to `p.grad`, which holds the earlier ones under no_sync()."""
        if not self.enabled or not self._calls:
            return
        total = held(grad.detach())
        if self._own[row] is not None:
            earlier = self.params()[row].grad
            if earlier is not None:
                wide = torch.promote_types(total.dtype, torch.float32)
                total = total.to(wide) + held(earlier.detach()).to(wide)
        self._own[row] = sq_norms([total], self.device)[0]

    def measure(self) -> GradStats:
        params = self.params()
        try:
            error = self._found_wrong(params)
            joined = self._join(params, error is not None)
        finally:
            self._calls, self._error, self._seen = [], None, None
            self._own = [None] * len(self.names)
        if error is not None:
            raise error
        every, failed = joined
        if failed.device.type == "cpu" and failed > 0:
            raise lost_step(failed, self.size)
        rows = len(self.names)
        own, grads = every[:, 2 : 2 + rows].t(), every[:, 2 + rows :]
        high, low = grads.amax(0), grads.amin(0)
        apart = high - low > AGREEMENT * high
        unseen = ~flags_on(tuple(self._watched), self.device)
        lost = (failed > 0).expand(rows)
        ok = ~apart & ~unseen & ~lost
        causes = ((lost, FAILED), (apart, APART), (unseen, UNSEEN))
        return self.build(every[:, 0], own / self.size**2, grads[0], ok, causes)

    def _join(self, params: list[Tensor], failed: bool) -> tuple[Tensor, Tensor]:
        """(W, 2 + 2P): every rank's samples, whether it failed, and its squared norms; how many did."""
        rows = len(params)
        part = torch.zeros(2 + 2 * rows, dtype=torch.float64, device=self.device)
        part[1] = float(failed)
        if not failed:
            part[0] = float(sum(c.size for c in self._calls))
            nothing = part.new_zeros(())
            part[2 : 2 + rows] = torch.stack([nothing if n is None else n for n in self._own])
            part[2 + rows :] = sq_norms([p.grad for p in params], self.device)
        every = part.new_empty(self.size * len(part))
        distributed.all_gather(every, part, group=self._group)
        every = every.view(self.size, -1)
        return every, every[:, 1].sum()

    def _found_wrong(self, params: list[Tensor]) -> GradStatsError | None:
        try:
            require_means(self._ddp)
        except GradStatsError as error:
            return error
        if not self._calls:
            return NoStatisticsError(
                "step() found no backward pass through the DistributedDataParallel model since the last "
                "step(). Call it once per optimizer step, after loss.backward(), on every rank."
            )
        if self._error is not None:
            return NoStatisticsError(f"{self._error}.")
        if self._seen is not None:
            grad, version = self._seen
            now = params[self._smallest].grad
            if now is not grad or now._version != version:
                return OrderError(
                    f"the gradient of parameter {self.names[self._smallest]!r} was changed, replaced or "
                    "cleared between backward and monitor.step(). Call monitor.step() right after "
                    "loss.backward(): before clipping, unscaling and zero_grad()."
                )
        return None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().close()
