"""Processes that train one model together: their statistics, joined in one collective per step.

Each rank sees its own samples, and `p.grad` is the mean of the ranks' gradients (DDP and FSDP2 divide
by their number W). So where a rank's backward delivers d_i for sample i, that sample's contribution to
`p.grad` is c_i = d_i/W. What the ranks exchange is their sample count and, for each parameter, Σ‖d_i‖²,
whether it was measured, and the squared norm of the gradient that it holds: 3P + 2 numbers in float64,
gathered and added in the order of the ranks, so that all have the same bits.

A step is collective, as a backward under DDP is. Nothing here waits for the device; with a backend that
blocks (gloo) it waits for the other ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradstats.calls import named
from gradstats.distributed import (
    AGREEMENT,
    ALONE,
    APART,
    FAILED,
    all_gather,
    initialised,
    lost_step,
    require_alike,
    sharded,
    tensor_parallel,
)
from gradstats.errors import GradStatsError, NoStatisticsError, UnsupportedLayerError
from gradstats.interpose import Interposer
from gradstats.record import Joined, Local

ELSEWHERE = "another rank did not measure it; coverage.missing there says why"


class Ranks:
    """The processes that a monitor shares its steps with. `sums`: keep Σ d_i for the moments."""

    def __init__(
        self, model: nn.Module, interposer: Interposer, group: Any, size: int, sums: bool
    ) -> None:
        self.size = size
        self._model = model
        self._sums: dict[int, Tensor] = {}
        self._interposer, self._group, self._keeps = interposer, group, sums
        self._members = set(dist.get_process_group_ranks(group or dist.group.WORLD))
        self._arrived: set[int] = set()
        self._held: dict[int, Tensor] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._handles: list[Any] = []
        self._names = tuple(interposer.index)
        self._layouts: dict[Any, int] = {}
        self._shares: dict[tuple[int, ...], Tensor] = {}
        interposer.adopted = self._watch

    # ---- which gradients this rank made --------------------------------------------------------

    def watch(self, params: Mapping[str, Tensor]) -> None:
        """Note from now on which parameters get a gradient from this rank's own backward.

        DDP hands every rank the mean gradient of a parameter that only some of them used.
        """
        for name, param in params.items():
            if not sharded(param):
                self._watch(name, param)

    def _watch(self, name: str, param: Tensor) -> None:
        if sharded(param):
            raise UnsupportedLayerError(tensor_parallel(name))
        row = self._interposer.index[name]
        self._watched[row] = weakref.ref(param)
        if not param.requires_grad:
            return
        if self._keeps:
            self._handles.append(param.register_hook(partial(self._hold, row)))
        arrive = partial(self._arrive, row)
        self._handles.append(param.register_post_accumulate_grad_hook(arrive))

    def _hold(self, row: int, grad: Tensor) -> None:
        """Runs before a gradient is added to `p.grad`, and in torch.autograd.grad too."""
        if self._interposer.enabled and not self._interposer.suspended:
            self._held[row] = grad.detach()

    def _arrive(self, row: int, param: Tensor) -> None:
        """Runs after a gradient was added to `p.grad`."""
        if not self._interposer.enabled:
            return
        if param.grad is None:
            return
        self._arrived.add(row)
        if self._keeps:
            grad = self._held.pop(row, None)
            if grad is None:  # torch 2.9 under a checkpoint; a step's first is all of p.grad
                grad = param.grad.detach()
                grad = torch.full_like(grad, torch.nan) if row in self._sums else grad
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            self._sums[row] = self._sums[row].add_(wide) if row in self._sums else wide

    def absent(self, params: Sequence[Tensor]) -> list[bool]:
        """Per parameter, whether nothing came from this rank's backward."""
        absent = []
        for row, param in enumerate(params):
            if row in self._arrived:
                absent.append(False)
            elif param.grad is None or not param.requires_grad:
                absent.append(True)
            else:
                known = self._watched.get(row)
                absent.append(known is not None and known() is param)
        return absent

    def own_sums(self) -> list[Tensor | None]:
        """Per parameter, the sum of this rank's contributions to it since the last step."""
        return [self._sums.get(row) for row in range(len(self._names))]

    def forget(self) -> None:
        """A new step begins."""
        self._arrived.clear()
        self._held.clear()
        self._sums.clear()

    def close(self) -> None:
        """Look no longer at gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._interposer.adopted = None

    # ---- collectives ---------------------------------------------------------------------------

    def join(self, params: Sequence[Tensor], local: Local, failed: bool = False) -> Joined:
        """Gather every rank's part. A rank that failed takes part too, and says so."""
        rows, ok, dtype = len(params), local.ok, local.sq_norm.dtype
        part = torch.empty(3 * rows + 2, dtype=torch.float64, device=ok.device)
        part[0].fill_(local.num_samples)
        part[1].fill_(failed)
        sums = local.sq_norm.sum(1, dtype=torch.float64)
        torch.cat((sums, local.grad_sq_norm.double(), ok.double()), out=part[2:])
        every = part.new_empty(self.size * len(part))
        all_gather(every, part, group=self._group)
        every = every.view(self.size, -1)
        total = every.sum(0)
        grads = every[:, 2 + rows : 2 + 2 * rows]
        grad_sq, low, high = grads[0], grads.amin(0), grads.amax(0)
        apart = high - low > AGREEMENT * high
        copies = tuple([self._copies(row, param) for row, param in enumerate(params)])
        if any(copies):
            share = self._shares.get(copies)
            if share is None:  # kept, because a copy to the device waits for it
                share = self._shares[copies] = part.new_tensor(copies)
            apart = apart & (share == 0)
            grad_sq = torch.where(share > 0, total[2 + rows : 2 + 2 * rows] / share, grad_sq)
        if local.lost is not None:
            apart = apart | local.lost
        measured = total[2 + 2 * rows :] == self.size
        missed = ok & ~measured
        any_failed = (total[1] > 0).expand(rows)
        return Joined(
            ranks=self.size,
            num_samples=total[0],
            sum_sq_norm=total[2 : 2 + rows],
            grad_sq_norm=grad_sq.to(dtype),
            ok=measured & ~apart & ~any_failed,
            failed=total[1],
            causes=((any_failed, FAILED), (apart, APART), (missed, ELSEWHERE)),
        )

    def join_failed(self, params: Sequence[Tensor]) -> Joined:
        """Tell the other ranks that this one has nothing, so that they do not wait for it."""
        zero = torch.zeros(len(params), dtype=torch.float32, device=self._interposer.device)
        return self.join(params, Local(0, zero[:, None], zero > 0, zero, ()), failed=True)

    def add_up(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the ranks, in one collective for each dtype, of the tensors' whole size."""
        found: dict[str, Tensor] = {}
        for dtype in (torch.float32, torch.float64):
            names = [n for n, t in tensors.items() if t.dtype == dtype]
            if names:
                flat = torch.cat([tensors[n].flatten() for n in names])
                dist.all_reduce(flat, group=self._group)
                parts = flat.split([tensors[n].numel() for n in names])
                found.update({n: p.view_as(tensors[n]) for n, p in zip(names, parts, strict=True)})
        return found

    def finish(self, joined: Joined) -> NoStatisticsError | None:
        """Make ready for the next step. Returns an error where it is known here that a rank failed."""
        self.forget()
        if joined.failed.device.type != "cpu" or not joined.failed:
            return None  # on a device nobody waits to know: the record's numbers are NaN
        return lost_step(joined.failed, self.size)

    # ---- where parameters are --------------------------------------------------------------------

    def _copies(self, row: int, param: Tensor) -> int:
        """0 for a parameter that every rank holds, else how many ranks hold each of its shards."""
        if not sharded(param):
            return 0
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        key = (row, mesh, placements)
        known = self._layouts.get(key)
        if known is not None:
            return known
        members, name = mesh.mesh.flatten().tolist(), self._names[row]
        if set(members) != self._members:
            raise UnsupportedLayerError(
                f"parameter {name!r} is sharded over the ranks {members}, and the statistics are "
                f"joined over {sorted(self._members)}. Pass the group of all data-parallel ranks, "
                "attach(..., process_group=...)."
            )
        *outer, last = placements
        if any(not p.is_replicate() for p in outer) or not last.is_shard():
            raise UnsupportedLayerError(tensor_parallel(name))
        self._check_divisor()
        self._layouts[key] = int(mesh.size() // mesh.size(mesh.ndim - 1))
        return self._layouts[key]

    def _check_divisor(self) -> None:
        """The units rest on it: FSDP2 divides by the number of ranks, but can be told otherwise."""
        for path, module in self._model.named_modules():
            state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
            found = getattr(state, "_fsdp_param_group", None)
            factor = getattr(found, "gradient_divide_factor", None)
            if factor is not None and factor != self.size:
                raise UnsupportedLayerError(
                    f"{named(path)} divides its gradients by {factor} and not by the {self.size} ranks "
                    "(set_gradient_divide_factor), so p.grad is not their mean. Scale the loss instead."
                )


def join_ranks(
    model: nn.Module, interposer: Interposer, group: Any, settings: str, sums: bool
) -> Ranks | None:
    """Meet the other ranks: collective. None for a process that trains alone.

    Raises AttachError on every rank where they were attached to different models or otherwise.
    """
    size = dist.get_world_size(group) if group is not ALONE and initialised() else 1
    if size <= 1:
        return None
    params = {n: p for n, p in model.named_parameters() if n in interposer.index}
    described = repr([(n, tuple(p.shape), p.requires_grad) for n, p in params.items()]) + settings
    require_alike(described, size, group, interposer.device)
    ranks = Ranks(model, interposer, group, size, sums)
    ranks.watch(params)
    return ranks


def require_joined(ranks: Ranks | None, group: Any, params: Sequence[Tensor]) -> None:
    """Raise where other processes have a part in the gradients that this monitor does not know."""
    if ranks is not None or group is ALONE or not initialised():
        return
    if any(sharded(p) and p.device_mesh.size() > 1 for p in params):  # type: ignore[attr-defined]
        raise GradStatsError(
            "the parameters are sharded over several processes, and this monitor was attached to one. "
            "Attach with process_group= all processes whose gradients are averaged."
        )
    if group is None:
        raise GradStatsError(
            "torch.distributed was initialised after attach(), so this monitor knows one process only. "
            "Call init_process_group first, then attach."
        )
