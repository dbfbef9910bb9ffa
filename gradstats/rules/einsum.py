"""einsum of an activation with a parameter, as the linear layers that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradstats.rules import Use, rule
from gradstats.rules.elementwise import elementwise
from gradstats.rules.linear import project
from gradstats.rules.view import parts, view


@rule(torch.einsum)
def einsum(use: Use, func: Callable[..., Any], equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    unruled = (equation, *operands), {}  # type: ignore[var-annotated]
    tracked = [i for i, t in enumerate(operands) if use.tracked(t)]
    if not tracked:
        return use.unruled(func, *unruled)
    if not isinstance(equation, str) or len(operands) != 2 or len(tracked) != 1:
        return use.unruled(func, *unruled)
    terms, _, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    i = tracked[0]
    weight, x = operands[i], operands[1 - i]
    if "." in equation or "->" not in equation or len(names) != 2 or use.mark(x) is not None:
        return use.unruled(func, *unruled)
    w_names, x_names = names[i], names[1 - i]
    known = set(x_names) | set(out)
    once = all(len(set(n)) == len(n) for n in (w_names, x_names, out))
    # A label of one operand alone that is summed over would be a sum before the product.
    alone = any(n not in set(w_names) | set(out) for n in x_names)
    if not once or alone or any(n not in known for n in w_names):
        return use.unruled(func, *unruled)
    if len(x_names) <= use.batch_dim or x_names[use.batch_dim] in w_names:
        return use.unruled(func, *unruled)
    use.batch_first(x)
    batch = x_names[use.batch_dim]
    shared = [n for n in w_names if n in x_names and n in out]  # a weight of its own for each
    inner = [n for n in w_names if n in x_names and n not in out]
    outer = [n for n in w_names if n not in x_names]
    rest = [n for n in x_names if n not in (batch, *shared, *inner)]
    sizes = dict(zip(x_names, x.shape, strict=True)) | dict(zip(w_names, weight.shape, strict=True))
    if not inner and not outer:
        return _product(use, x, weight, x_names, w_names, out)

    def size(labels: list[str]) -> int:
        n = 1
        for label in labels:
            n *= sizes[label]
        return n

    if len(shared) > 1:
        return use.unruled(func, *unruled)
    x = x.permute([x_names.index(n) for n in (*shared, batch, *rest, *inner)])
    x = x.reshape(size(shared), sizes[batch], size(rest), size(inner))
    weights = [weight]
    if shared:
        weights = parts(use, torch.unbind, weight, w_names.index(shared[0]))
    left = [n for n in w_names if n not in shared]
    order = [left.index(n) for n in (*outer, *inner)]
    results = []
    for a, w in zip(x, weights, strict=True):
        if order != list(range(len(order))):
            w = view(use, Tensor.permute, w, order)
        w = view(use, Tensor.reshape, w, (size(outer), size(inner)))
        results.append(project(use, a, w, None, 0))
    labels = (*shared, batch, *rest, *outer)
    y = torch.stack(results).reshape([sizes[n] for n in labels])
    return y.permute([labels.index(n) for n in out])


def _product(
    use: Use, x: Tensor, weight: Tensor, x_names: str, w_names: str, out: str
) -> Any:  # fmt: skip
    """Nothing is summed over: an elementwise product, with the weight's labels in x's order."""
    order = sorted(range(len(w_names)), key=lambda k: x_names.index(w_names[k]))
    weight = view(use, Tensor.permute, weight, order)
    for at, name in enumerate(x_names):
        if name not in w_names:
            weight = view(use, torch.unsqueeze, weight, at)
    return elementwise(use, torch.mul, x, weight).permute([x_names.index(n) for n in out])
