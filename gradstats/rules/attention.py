"""Multi-head attention, spelled out in operations that have rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.rules import Use, rule
from gradstats.rules.linear import project
from gradstats.rules.view import parts


@rule(F.multi_head_attention_forward, per_position=True)
def attention(
    use: Use, func: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor,
    embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None,
    bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    """Vaswani et al. 2017, eq. 1, as torch computes it; inputs are (T, B, E), samples in dim 1."""
    given = (
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
        bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
        key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
        k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
    )  # fmt: skip
    rare = bias_k is not None or add_zero_attn or static_k is not None or static_v is not None
    samples = use.batch if use.positions is None else use.positions[0]
    batched = query.dim() == 3 and key.dim() == 3 and query.shape[1] == key.shape[1] == samples
    if rare or not batched or (is_causal and attn_mask is None):
        return use.unruled(func, given, {})
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = _projected(use, (query, key, value), weights, in_proj_bias)
    elif query is key and key is value:
        packed = project(use, query, in_proj_weight, in_proj_bias, 1)
        q, k, v = packed.unflatten(-1, (3, -1)).movedim(-2, 0).contiguous()
    elif key is value:
        e = query.shape[-1]
        weights = parts(use, torch.split, in_proj_weight, [e, 2 * e])
        q, both = _projected(use, (query, key), weights, in_proj_bias, [e, 2 * e])
        k, v = both.unflatten(-1, (2, -1)).movedim(-2, 0).contiguous()
    else:
        weights = parts(use, torch.chunk, in_proj_weight, 3)
        q, k, v = _projected(use, (query, key, value), weights, in_proj_bias)

    (length, batch, width), source = q.shape, k.shape[0]
    q, k, v = (
        t.reshape(t.shape[0], batch * num_heads, width // num_heads).transpose(0, 1)
        for t in (q, k, v)
    )
    # Without weights to return, a causal mask is left to the kernel, as torch does.
    hidden = is_causal and key_padding_mask is None and not need_weights
    mask = None if hidden else _mask(attn_mask, key_padding_mask, q.dtype, batch, num_heads, source)
    drop = dropout_p if training else 0.0
    if not need_weights:
        q, k, v = (t.reshape(batch, num_heads, *t.shape[1:]) for t in (q, k, v))
        if mask is not None:
            per_head = mask.shape[0] == batch * num_heads
            mask = (
                mask.reshape(batch, num_heads, *mask.shape[1:]) if per_head else mask.unsqueeze(0)
            )
        out = F.scaled_dot_product_attention(q, k, v, mask, drop, hidden)
        out = out.permute(2, 0, 1, 3).reshape(length, batch, width)
        return project(use, out, out_proj_weight, out_proj_bias, 1), None
    q = q * math.sqrt(1.0 / q.shape[-1])
    k = k.transpose(-2, -1)
    scores = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)
    shares = F.softmax(scores, dim=-1)
    if drop > 0.0:
        shares = F.dropout(shares, p=drop)
    out = torch.bmm(shares, v).transpose(0, 1).reshape(length, batch, width)
    out = project(use, out, out_proj_weight, out_proj_bias, 1)
    shares = shares.view(batch, num_heads, length, source)
    return out, shares.mean(dim=1) if average_attn_weights else shares


def _projected(
    use: Use, inputs: Any, weights: Any, bias: Tensor | None, sizes: list[int] | None = None
) -> list[Tensor]:
    """Each input through its own weight, and its part of the bias."""
    biases: Any = [None] * len(inputs)
    if bias is not None and sizes is not None:
        biases = parts(use, torch.split, bias, sizes)
    elif bias is not None:
        biases = parts(use, torch.chunk, bias, len(inputs))
    return [project(use, x, w, b, 1) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _mask(
    mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, batch: int, heads: int,
    source: int,
) -> Tensor | None:  # fmt: skip
    """What is added to the scores: (1 or B·heads, T, S), or (B·heads, 1, S); None for nothing."""
    mask, padding = (_additive(m, dtype) for m in (mask, padding))
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if padding is None:
        return mask
    padding = padding.view(batch, 1, 1, source).expand(-1, heads, -1, -1)
    padding = padding.reshape(batch * heads, 1, source)
    return padding if mask is None else mask + padding


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
