"""Forward passes of a model: each opens with a leaf for its statistics; checkpoints find theirs again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradstats import tracing
from gradstats.calls import named, require_no_capture, tensors_in, within
from gradstats.errors import BatchDimError, UnsupportedLayerError
from gradstats.grouping import Counted, Grouping
from gradstats.probes import Delivery, Ledger, Pass, new_leaf


class Passes:
    """The part of the interposer that knows which passes there are."""

    index: dict[str, int]  # rows of the parameters, by name
    batch_dim: int
    dtype: torch.dtype
    device: torch.device
    ledger: Ledger
    current: Pass | None
    groups: Grouping | None  # of the forwards to come
    counted: Counted | None  # of the forwards to come, where not all samples count
    missed: dict[str, str]
    uncovered: dict[str, str]
    shortcuts: Any
    _passes: list[Pass]

    def _open(self, path: str, args: Any, kwargs: Any) -> Pass:
        require_no_capture()
        if torch._C._current_graph_task_id() != -1:
            return self._reopen(path, args, kwargs)
        if tracing.HIDES_CONSTRUCTORS:  # for a part of the model that is compiled
            tracing.show_constructors()
        if self.ledger.between is not None and self.ledger.deliveries:
            self.ledger.between()
        delivered = [d.leaf for d in self.ledger.deliveries]
        self._passes = [p for p in self._passes if not any(p.leaf is leaf for leaf in delivered)]
        groups = self.groups
        batch = self._batch_size(path, args, kwargs) if groups is None else groups.batch
        if self.counted is not None and self.counted.size != batch:
            raise BatchDimError(
                f"samples(mask=...) has {self.counted.size} entries, and {named(path)} got {batch} "
                "samples. Give it an entry for each sample."
            )
        opened = Pass(batch, *self._leaf(batch), groups=groups)
        opened.look_at(tensors_in(*args, kwargs), self.batch_dim)
        self._passes.append(opened)
        return opened

    def _leaf(self, batch: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A leaf for the statistics of a pass, and its rows: a new one, or one that nobody holds."""
        pooled = self.shortcuts if self.counted is None else None
        known = None if pooled is None else pooled.take_leaf(batch + 1)
        if known is not None:
            earlier = [p for p in self._passes if p.leaf is known[0]]  # whose graph is gone
            if not any(p.skipped for p in earlier):  # or is made when a checkpoint recomputes
                self._passes = [p for p in self._passes if p not in earlier]
                return known  # type: ignore[no-any-return]
        leaf = new_leaf(len(self.index), batch, self.dtype, self.device)
        deliver = self.ledger.hook(self.counted)
        leaf.register_post_accumulate_grad_hook(deliver)
        if pooled is None:
            return leaf, leaf.unbind(0)
        rows = pooled.rows_of_leaf(leaf, deliver)
        pooled.keep_leaf(leaf, rows)
        return leaf, rows

    def _reopen(self, path: str, args: Any, kwargs: Any) -> Pass:
        """A checkpoint recomputes in the backward: find the pass that it belongs to."""
        told = self.groups  # by the part that is recomputed
        size = self._batch_size(path, args, kwargs) if told is None else told.batch
        fitting = [p for p in self._passes
                   if p.batch == size or (p.groups is not None and size in (1, p.groups.rows))]  # fmt: skip
        if not fitting or (len(fitting) > 1 and any(p.skipped for p in fitting)):
            raise UnsupportedLayerError(
                f"{named(path)} is recomputed by a checkpoint in the backward, and {len(fitting)} "
                "forward passes could be the one it belongs to. Use "
                "checkpoint(..., use_reentrant=False), or run backward before the next forward."
            )
        found = fitting[-1]
        return Pass(
            found.batch,
            found.leaf,
            found.leaf.unbind(0),
            recomputing=True,
            groups=told or found.groups,
        )

    def _was_within_fallback(self, path: str) -> bool:
        """Whether a checkpoint recomputes what ran without rules, inside a module of the fallback."""
        if torch._C._current_graph_task_id() == -1:
            return False
        return any(within(path, outer) for p in self._passes for outer in p.by_fallback)

    def samples_around(self) -> int | None:
        """Samples of the forward that runs, or that a checkpoint recomputes a part of."""
        if self.current is not None:
            return self.current.batch
        recomputing = torch._C._current_graph_task_id() != -1 and self._passes
        return self._passes[-1].batch if recomputing else None

    def take(self) -> tuple[list[Delivery], dict[str, str]]:
        """What was delivered since the last call, and why some parameters were not."""
        missed, self.missed = self.missed, {}
        self._passes.clear()
        return self.ledger.take(), {**missed, **self.uncovered}

    def _batch_size(self, path: str, args: Any, kwargs: Any) -> int:
        for tensor in tensors_in(*args, kwargs):
            if tensor.dim() > self.batch_dim:
                return tensor.shape[self.batch_dim]
        raise BatchDimError(
            f"{named(path)} was called without a tensor that has a dimension {self.batch_dim}, so "
            "the number of samples is not known. Pass the batch to the module that you attached, or "
            "set attach(batch_dim=...)."
        )
