"""Probes: zero tensors whose gradients are the statistics.

Every forward pass of the model owns one leaf of shape (P, B + 1): a row per parameter, an entry per
sample, and a last entry that counts how often the row was delivered. An operation that a rule
handles takes its parameter's row as an input and returns the per-sample squared norms, followed by
a 1, as the gradient of that row. So the state lives in the autograd graph: whatever the graph does
(compilation, checkpointing, two live forwards), the rows do too.

The second moments travel the same way on one leaf per parameter, shaped like it. These leaves have
stride 0 and take no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstats.grouping import Counted, Grouping

ATTRIBUTE = "_gradstats"
Part = tuple[int, int, int]


class Mark:
    """What is known of a tensor that no sample is in: kept in its attribute `_gradstats`.

    `name` is the parameter that it is (or a view of), None for a constant. `m2` is the probe of that
    parameter's second moment, seen through the same views. `ids` are the rows that were looked up,
    where the tensor is the result of an embedding without a batch dimension. `part` is the
    (dimension, begin, end) of the parameter that it lies in, where it is not all of it: parts that
    do not overlap have no cross terms.
    """

    __slots__ = ("ids", "m2", "name", "num_embeddings", "padding_idx", "part")

    def __init__(
        self,
        name: str | None = None,
        m2: Tensor | None = None,
        ids: Tensor | None = None,
        num_embeddings: int = 0,
        padding_idx: int = -1,
        part: Part | None = None,
    ) -> None:
        self.name = name
        self.m2 = m2
        self.ids = ids
        self.num_embeddings = num_embeddings
        self.padding_idx = padding_idx
        self.part = part

    def __reduce__(self) -> Any:
        return (nothing, ())  # a pickled parameter comes back as any other


def nothing() -> None:
    return None


CONSTANT = Mark()


class Probe(NamedTuple):
    """Where one use of a parameter delivers: its row (B + 1,) and its second moment's leaf."""

    row: Tensor | None
    m2: Tensor | None


NO_PROBE = Probe(None, None)


class UseOf(NamedTuple):
    """One use of a parameter in a forward pass: the frames that were open, the part of it."""

    frames: tuple[Frame, ...]
    part: Part | None

    def overlaps(self, part: Part | None) -> bool:
        if self.part is None or part is None or self.part[0] != part[0]:
            return True
        return self.part[1] < part[2] and part[1] < self.part[2]


def row_gradient(sq_norm: Tensor) -> Tensor:
    """The gradient of a row: the squared norms (B,) and the count of this delivery."""
    if torch.compiler.is_compiling():
        return torch.cat((sq_norm, sq_norm.new_ones(1)))
    return torch.cat((sq_norm, _one(sq_norm.dtype, sq_norm.device)))


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(1, dtype=dtype, device=device)


def new_leaf(params: int, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(P, B + 1) zeros that take the gradients of the rows."""
    return torch.zeros(params, batch + 1, dtype=dtype, device=device, requires_grad=True)


def new_m2_leaf(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros shaped like the parameter, of stride 0."""
    zero = torch.zeros((), dtype=dtype, device=param.device)
    return zero.expand(param.shape).detach().requires_grad_()


class Numbered(torch.autograd.Function):
    """The rows (P, B + 1) of a leaf that has one more, to which the forward's number is delivered.

    All runs of a compiled graph share the leaf; the number tells two runs from two backwards of one.
    """

    @staticmethod
    def forward(ctx, leaf, number):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(number)
        return leaf[:-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (number,) = ctx.saved_tensors
        return torch.cat((g, number.to(g.dtype).expand(1, g.shape[1]))), None


class Frame:
    """One run of one module's forward."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class Pass:
    """One forward pass of the model: its batch size, its rows, and who used which parameter."""

    def __init__(
        self, batch: int, leaf: Tensor, rows: tuple[Tensor, ...], recomputing: bool = False,
        groups: Grouping | None = None,
    ) -> None:  # fmt: skip
        self.batch = batch
        self.groups = groups  # where some tensors hold rows of samples, not samples
        self.leaf = leaf
        self.rows = rows
        self.recomputing = recomputing  # a checkpoint runs part of it again, in the backward
        self.skipped = False  # part of it ran without gradients, as in a reentrant checkpoint
        self.uses: dict[str, tuple[UseOf, ...]] = {}
        self.retrace = False  # a parameter turned out to have several uses in the graph
        self.by_fallback: set[str] = set()  # modules that were run sample by sample
        self.joints: dict[str, Any] = {}  # of parameters that only joinable rules used
        self.inputs: tuple[Tensor, ...] = ()
        self.square = False  # an input has as many positions as there are samples

    def look_at(self, inputs: Iterable[Tensor], batch_dim: int) -> None:
        """Remember the inputs, which hold samples, until the forward is over."""
        self.inputs = tuple(inputs)
        for tensor in self.inputs:
            for dim, size in enumerate(tensor.shape):
                if dim != batch_dim and size == self.batch:
                    self.square = True


@dataclass
class Delivery:
    """The rows of one pass after (part of) its backward: gradient (P, B + 1) on `leaf` or `rows`."""

    batch: int
    task: int  # the engine's number of the backward() call; passes of one call are one batch
    leaf: Tensor | None = None
    rows: Tensor | None = None
    counted: Counted | None = None  # the samples that count, where not all do
    number: Tensor | None = None  # 0-d, of the forward, where it ran in a compiled graph

    def gradient(self) -> Tensor:
        """(P, B + 1) what was delivered."""
        rows = self.rows if self.leaf is None else self.leaf.grad
        assert rows is not None
        return rows


# Runs a function when the backward that runs is over.
at_the_end = torch.autograd.Variable._execution_engine.queue_callback


@dataclass
class Ledger:
    """Collects deliveries between two steps. Filled by hooks that the autograd engine runs."""

    deliveries: list[Delivery] = field(default_factory=list)
    between: Callable[[], None] | None = None  # wants to run after each backward, before the next
    settled: Callable[[], None] | None = None  # wants to run at the end of each backward

    def deliver(self, leaf: Tensor, counted: Counted | None = None) -> None:
        """Hook of a leaf that belongs to one eager pass; it may fire in several parts."""
        task = torch._C._current_graph_task_id()
        if self.settled is not None:
            at_the_end(self.settled)
        for known in self.deliveries:
            if known.leaf is leaf:
                known.task = min(known.task, task)
                return
        self.deliveries.append(Delivery(leaf.shape[1] - 1, task, leaf=leaf, counted=counted))

    def hook(self, counted: Counted | None) -> Callable[[Tensor], None]:
        """`deliver` for a leaf, which a graph may keep longer than there is a ledger."""
        it = weakref.ref(self)

        def deliver(leaf: Tensor) -> None:
            ledger = it()
            if ledger is not None:
                ledger.deliver(leaf, counted)

        return deliver

    def deliver_shared(self, leaf: Tensor) -> None:
        """Hook of the leaf that every run of a compiled graph shares: take the gradient away."""
        rows, leaf.grad = leaf.grad, None
        assert rows is not None
        task = torch._C._current_graph_task_id()
        self.deliveries.append(
            Delivery(leaf.shape[1] - 1, task, rows=rows[:-1], number=rows[-1, -1])
        )
        for callback in (self.between, self.settled):
            if callback is not None:  # no eager code runs before the next compiled forward
                at_the_end(callback)

    def take(self) -> list[Delivery]:
        """Everything delivered since the last call. Also frees the leaves for what comes later."""
        taken, self.deliveries = self.deliveries, []
        for delivery in taken:
            delivery.rows = delivery.gradient()
            if delivery.leaf is not None:
                delivery.leaf.grad, delivery.leaf = None, None
        return taken
