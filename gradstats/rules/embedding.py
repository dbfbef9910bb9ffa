"""Embedding lookups, with a batch dimension or, as for positions, without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import ATTRIBUTE, Mark, row_gradient
from gradstats.rules import Use, rule
from gradstats.rules.chain import LOOKUP
from gradstats.rules.joint import Lookup


class Embedding(torch.autograd.Function):
    """Rows of a weight; ids have their samples in dimension `batch_dim`."""

    @staticmethod
    def forward(ctx, weight, ids, row, m2, padding_idx, batch_dim, joint):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.num_embeddings, ctx.padding_idx = weight.shape[0], padding_idx
        ctx.batch_dim, ctx.joint = batch_dim, joint
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        batch = ids.shape[ctx.batch_dim]
        # -1 says nothing where there is no sample.
        ids = ids.movedim(ctx.batch_dim, 0).reshape(batch, -1 if batch else 1)
        each = g.movedim(ctx.batch_dim, 0).reshape(batch, ids.shape[1], g.shape[-1])
        moments = ctx.needs_input_grad[3]
        dw, sq_norm, m2 = call.embedding_stats(
            ids, each, ctx.num_embeddings, ctx.padding_idx, moments
        )
        row = None
        if ctx.needs_input_grad[2] and ctx.joint is not None:
            row = ctx.joint.row_gradient(
                id(ctx), sq_norm, lambda: Lookup(torch.where(ids == ctx.padding_idx, -1, ids), each)
            )
        elif ctx.needs_input_grad[2]:
            row = row_gradient(sq_norm)
        return dw, None, row, m2 if moments else None, None, None, None


@rule(F.embedding, per_position=True)
def embedding(
    use: Use,
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    mark = use.mark(weight)
    if mark is None or mark.ids is not None or not weight.requires_grad:
        return use.unruled(func, (input, weight, *options), {})
    if scale_grad_by_freq:
        use.refuse(
            "an embedding with scale_grad_by_freq=True divides by counts over the whole batch, so "
            "its gradient is not a sum over samples",
            "set scale_grad_by_freq=False",
        )
    if sparse:
        use.refuse("an embedding with sparse=True has sparse gradients", "set sparse=False")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    padding = -1 if padding_idx is None else padding_idx
    if _without_samples(use, input):
        out = func(input, weight, *options)
        lookup = Mark(mark.name, mark.m2, input, weight.shape[0], padding)
        setattr(out, ATTRIBUTE, lookup)
        return out
    input, back = use.grouped(input)
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    joint, chain = use.joint(weight), use.chain(weight) if use.tracing else None
    row, m2 = use.probe(weight)
    out = Embedding.apply(weight, input, row, m2, padding, use.batch_dim, joint)
    if chain is not None:
        samples = input.shape[use.batch_dim]
        ids = input.movedim(use.batch_dim, 0).reshape(samples, -1 if samples else 1)
        out = chain.link(out, row, LOOKUP, torch.where(ids == padding, -1, ids), use.batch_dim)
    return back(out)


@rule(F.embedding_bag)
def embedding_bag(
    use: Use, func: Callable[..., Any], input: Tensor, weight: Tensor,
    offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:  # fmt: skip
    """A lookup, then the sum, mean or maximum over each bag; there are as many bags as samples."""
    given = (input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
             per_sample_weights, include_last_offset, padding_idx)  # fmt: skip
    if not use.tracked(weight) or use.batch_dim != 0:
        return use.unruled(func, given, {})
    if offsets is None:
        ids, kept = input, torch.ones_like(input, dtype=torch.bool)
    else:
        ids, kept, per_sample_weights = _bags(
            input, offsets, include_last_offset, per_sample_weights
        )
    use.batch_first(ids)
    if padding_idx is not None:
        kept = kept & (ids != padding_idx % weight.shape[0])
    rows = embedding(
        use, F.embedding, ids, weight, None, max_norm, norm_type, scale_grad_by_freq, sparse
    )
    kept = kept.unsqueeze(-1)
    if mode == "max":
        out = rows.masked_fill(~kept, -torch.inf).amax(1) if ids.shape[1] else rows.sum(1)
        return torch.where(kept.any(1), out, torch.zeros_like(out))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    total = torch.where(kept, rows, torch.zeros_like(rows)).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp_min(1)


def _bags(
    flat: Tensor, offsets: Tensor, with_end: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids of bags of any length as (bags, longest), which of them exist, their weights."""
    begins = offsets[:-1] if with_end else offsets
    end = offsets[-1:] if with_end else offsets.new_full((1,), flat.shape[0])
    lengths = torch.cat((begins[1:], end)) - begins
    longest = int(lengths.max()) if lengths.numel() else 0
    at = torch.arange(longest, device=flat.device)
    kept = at < lengths.unsqueeze(1)
    where = (begins.unsqueeze(1) + at).clamp_max(max(flat.shape[0] - 1, 0))
    return flat[where], kept, None if weights is None else weights[where]


def _without_samples(use: Use, ids: Tensor) -> bool:
    """Whether ids are the same for every sample: made without the inputs, or too small for them."""
    if use.mark(ids) is not None:
        return not (use.told() and use.is_flattened(ids))
    if use.is_flattened(ids):
        return False
    if use.batch != 1 and ids.dim() == 2 and ids.shape[0] == 1 and use.batch_dim == 0:
        return True
    if ids.dim() != 1:
        return False
    if use.is_batched(ids) and use.is_ambiguous(ids):
        use.refuse(
            f"{ids.shape[0]} ids could be one id per sample or one per position, for the batch has "
            f"{use.batch} samples and its input another dimension of {use.batch} too",
            "give the ids two dimensions, (samples, 1) or (1, positions)",
        )
    return not use.is_batched(ids)
