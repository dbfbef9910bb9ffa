"""Rules: for each torch function, how to compute it so that it delivers per-sample statistics.

A rule is a pure function `rule(use, func, *args, **kwargs)`. It gets the torch function and the very
arguments of the call, asks `use` for the probes of the parameters among them, and returns what the
function would return. Add one with the decorator:

    @rule(torch.nn.functional.linear)
    def linear(use, func, x, weight, bias=None): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from torch import Tensor

from gradstats.probes import Mark, Probe


class Use(Protocol):
    """What a rule may ask of the forward pass it runs in."""

    batch_dim: int
    batch: int  # B, samples in this forward pass
    positions: tuple[int, int] | None  # (sequences, positions) where every position is a sample

    def mark(self, tensor: object) -> Mark | None:
        """The mark of a tensor without samples; None for anything else."""

    def tracked(self, *tensors: object) -> bool:
        """Whether any of these is a trainable parameter, or a view or lookup of one."""

    def probe(self, tensor: Tensor | None) -> Probe:
        """The probe of a parameter; counts as a use of it."""

    def joint(self, tensor: Tensor | None) -> Any:
        """Ask before `probe`: the `rules.joint.Joint` of a parameter whose uses may be several."""

    watching: bool  # for functions that put samples into another order

    def note_displaced(self, sample: int) -> None:
        """One did, and another row took the place of this sample's."""

    tracing: bool  # a graph is compiled, which `joint` cannot serve

    def chain(self, tensor: Tensor | None) -> Any:
        """The same in a graph that is traced: the `rules.chain.Chain`, None where there is one use."""

    def batch_first(self, tensor: Tensor) -> Tensor:
        """`tensor` with its samples in dimension 0; raises BatchDimError where they are not."""

    def grouped(self, tensor: Tensor) -> tuple[Tensor, Callable[[Any], Any]]:
        """`tensor` with its samples in dimension `batch_dim`, and the way back for the result.

        Where `Monitor.samples` says which rows of a flattened tensor belong together, that is
        (B, longest, …); elsewhere it is the tensor itself. Raises as `batch_first` does.
        """

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether `tensor` has B entries where the samples are expected."""

    def told(self) -> bool:
        """Whether `Monitor.samples` speaks of this forward's rows."""

    def is_flattened(self, tensor: Tensor) -> bool:
        """Whether the rows of `tensor` are those that `Monitor.samples` speaks of."""

    def is_ambiguous(self, tensor: Tensor) -> bool:
        """Whether a tensor with one dimension of B could as well be without samples."""

    def unruled(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Go on as if there were no rule for this call."""

    def refuse(self, what: str, instead: str) -> NoReturn:
        """Raise UnsupportedLayerError, naming the layer."""


Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}
PER_POSITION: set[Callable[..., Any]] = set()  # those that also serve single positions


def rule(*functions: Callable[..., Any], per_position: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for some torch functions.

    `per_position`: the function treats (batch, positions, …) position by position, and its rule brings
    its input to samples by `use.grouped`, so it also serves `attach(sample="token")`.
    """

    def register(function: Rule) -> Rule:
        for key in functions:
            RULES[key] = function
        if per_position:
            PER_POSITION.update(functions)
        return function

    return register


# Imported for what they register.
from gradstats.rules import (  # noqa: E402
    attention,  # noqa: F401
    conv,  # noqa: F401
    einsum,  # noqa: F401
    elementwise,  # noqa: F401
    embedding,  # noqa: F401
    linear,  # noqa: F401
    norm,  # noqa: F401
    recurrent,  # noqa: F401
    reorder,  # noqa: F401
    view,  # noqa: F401
)
