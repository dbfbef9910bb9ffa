"""`attach(self_check=k)`: the kernels against their definition, on the user's own data.

Every k measured steps one of the step's statistics operations, drawn by a seeded generator, is
computed again for two of its samples by `gradstats.reference` in float64, and their squared norms are
compared. That checks the backend that ran (its kernel, on this data, its shapes, strides and dtype).
It does not check whether the rule gave the operation the right inputs, elementwise parameters, the
fallback, second moments, or the weight's gradient: `gradstats.check` checks those.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstats import ops, reference
from gradstats.errors import GradStatsError
from gradstats.probes import ATTRIBUTE

# Operation -> how many leading arguments hold samples in dimension 0, which results are gradients, and
# which are their squared norms.
_OPERATIONS = {
    "linear_stats": (2, (0, 1), (2, 3)),
    "layer_norm_stats": (4, (1, 2), (3, 4)),
    "group_norm_stats": (4, (1, 2), (3, 4)),
    "embedding_stats": (2, (0,), (1,)),
    "conv_stats": (2, (0, 1), (2, 3)),
}
# Where the backward of a rule has its weight and bias.
_FIRST_PARAMETER = {
    "LinearBackward": 1,
    "ConvBackward": 1,
    "LayerNormBackward": 1,
    "GroupNormBackward": 1,
    "EmbeddingBackward": 0,
}
TOLERANCE, TOLERANCE_FLOAT64 = 2e-2, 1e-6  # matrix units may round float32 products to TF32


class _Held(NamedTuple):
    operation: str
    layer: str
    samples: list[int]
    args: tuple[Any, ...]  # of those samples alone
    seen: list[Tensor]  # squared norms of those samples
    largest: list[Tensor]  # of all samples


class SelfCheck:
    """Looks at one operation in every `every`-th measured step. Holds two samples of its inputs."""

    def __init__(self, every: int, seed: int = 0) -> None:
        self._every = every
        self._random = random.Random(seed)
        self._steps = self._count = 0
        self._held: _Held | None = None
        self._next()

    def _next(self) -> None:
        self.close()
        if self._steps % self._every == 0:
            ops.observers.append(self._observe)

    def close(self) -> None:
        """Look no longer."""
        self._count, self._held = 0, None
        if self._observe in ops.observers:
            ops.observers.remove(self._observe)

    def _observe(self, operation: str, args: tuple[Any, ...], results: Any) -> None:
        """Every operation of the step is as likely to be the one that is held."""
        batch = args[0].shape[0] if operation in _OPERATIONS else 0
        if not batch:
            return
        self._count += 1
        if self._random.randrange(self._count):
            return
        lead, gradients, positions = _OPERATIONS[operation]
        samples = sorted(self._random.sample(range(batch), min(2, batch)))
        index = torch.tensor(samples, device=args[0].device)

        def part(i: int, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach()
            return value.index_select(0, index) if i < lead else value.clone()

        shapes = [tuple(results[i].shape) for i in gradients if results[i].numel()]
        norms = [results[i] for i in positions if results[i].numel()]
        if not norms:
            return
        self._held = _Held(
            operation,
            _layer() or f"a layer with a gradient of shape {shapes[0]}",
            samples,
            tuple(part(i, value) for i, value in enumerate(args)),
            [n.index_select(0, index) for n in norms],
            [n.amax() for n in norms],
        )

    def finish(self) -> None:
        """Compare, at the end of a step; waits for the device if something was held.

        Raises GradStatsError where a squared norm is not what the definition gives.
        """
        held = self._held
        self._steps += 1
        self._next()
        if held is None:
            return
        wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                     for a in held.args)  # fmt: skip
        results = getattr(reference, held.operation)(*wide)
        positions = _OPERATIONS[held.operation][2]
        expected = [results[i] for i in positions if results[i].numel()]
        for seen, true, largest in zip(held.seen, expected, held.largest, strict=True):
            exact = seen.dtype == torch.float64
            allowed = TOLERANCE_FLOAT64 if exact else TOLERANCE
            scale = true.abs().clamp_min(float(largest) * 1e-5 if torch.isfinite(largest) else 0)
            wrong = torch.isfinite(true) & ~((seen.double() - true).abs() <= allowed * scale)
            if bool(wrong.any()):
                raise GradStatsError(
                    f"self check: {held.layer}, {held.operation} in {seen.dtype}: the squared norms of "
                    f"samples {held.samples} came out as {_numbers(seen)}, and are {_numbers(true)}. "
                    "The backend that computed them is wrong on this data: see `python -m gradstats "
                    "doctor`, use gradstats.backends.use('reference'), and please report it."
                )


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.6g}" for v in values.tolist()) + "]"


def _layer() -> str | None:
    """The parameter whose gradient the running backward computes; None where the graph does not tell."""
    node = torch._C._current_autograd_node()
    kind = getattr(node, "name", lambda: "")()
    if kind not in _FIRST_PARAMETER:
        return None
    first = _FIRST_PARAMETER[kind]
    for function, _ in node.next_functions[first : first + 2]:
        while function is not None:
            mark = getattr(getattr(function, "variable", None), ATTRIBUTE, None)
            if mark is not None and mark.name is not None:
                return f"parameter {mark.name!r}"
            following = function.next_functions  # of a view or a cast
            function = following[0][0] if following else None
    return None
