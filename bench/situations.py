"""What conformance.py asks every tool: one small model, batch and way to train for each situation.

The problems of `tests/models.py`, and the situations that need more than a model: an option to be
told, a script of forwards and backwards, a dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import situation_parts as P
import torch
from situation_parts import PROBLEMS, Situation, used
from torch import Tensor, nn

S, Linear, Tanh = nn.Sequential, nn.Linear, nn.Tanh
TEXT = {  # the problems of tests/models.py; others go by their names
    "mlp": "linear layers", "sequence": "linear layers on sequences",
    "layer_norm_wide": "LayerNorm of shapes, without bias",
    "four_dimensions": "linear layers, 4-D input", "rms_norm": "RMSNorm", "layer_norm": "LayerNorm",
    "group_norm": "GroupNorm", "group_norm_vectors": "GroupNorm of vectors",
    "instance_norm": "InstanceNorm", "eval_batch_norm": "BatchNorm in eval mode",
    "conv1d": "Conv1d", "conv2d": "Conv2d", "conv3d": "Conv3d",
    "conv2d_same": "convolution, padding by name", "conv2d_modes": "all padding modes in a row",
    "conv2d_groups": "grouped and depthwise in a row",
    "conv_transpose": "transposed convolution, groups, output_padding",
    "padding_idx": "Embedding with padding_idx",
    "positions": "position embedding without batch dimension",
    "positions_one_row": "position ids of one row",
    "positions_as_long_as_the_batch": "positions as many as samples",
    "positions_laid_out": "position ids for every sample", "positions_copied": "position ids, copied",
    "positions_copied_as_long_as_the_batch": "position ids, copied, as many as samples",
    "positions_repeated": "a position looked up twice",
    "custom": "raw parameters (scales, shifts, positions)", "class_token": "class token",
    "functional": "parameters used by F.linear, @, addmm",
    "frozen_parts": "frozen weights and biases, mixed", "in_place": "in-place activation",
    "twice": "a module called twice", "tied": "tied embedding and head",
    "one_plus": "(1 + weight) scale", "attention": "nn.MultiheadAttention",
    "lstm": "nn.LSTM, loss of outputs and state",
    "lstm_deep": "nn.LSTM, two layers, both directions",
    "lstm_projected": "nn.LSTM with projection", "gru": "nn.GRU", "rnn": "nn.RNN",
    "bilinear": "nn.Bilinear", "cross_attention": "cross attention, sequence first",
    "cross_attention_biases": "attention with bias_k, bias_v",
    "attention_of_three": "attention of three inputs",
    "attention_with_widths": "attention, kdim and vdim",
    "transformer_layers": "nn.Transformer layers", "einsum": "einsum with parameters",
    "slices": "parts of a weight used apart", "slice_with_an_offset": "part of a position table",
    "slices_overlapping": "overlapping parts of a weight",
    "embedding_bags": "EmbeddingBag (all modes, weights, offsets)", "weight_norm": "weight_norm",
    "prelu": "PReLU",
}  # fmt: skip


def vectors(n: int) -> Tensor:
    return torch.randn(n, 6)


def sequence(n: int) -> Tensor:
    return torch.randn(n, 7, 6)


def ids(n: int) -> Tensor:
    return torch.randint(0, 13, (n, 7))


def signal(n: int) -> Tensor:
    return torch.randn(n, 3, 9)


def image(n: int) -> Tensor:
    return torch.randn(n, 6, 5, 6)


def table(n: int) -> Tensor:
    return torch.randn(7, n, 6)


def two() -> nn.Module:
    return S(Linear(6, 8), Tanh(), Linear(8, 3))


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: S(nn.Conv2d(6, 6, 3, bias=False, **options), Tanh(), nn.Conv2d(6, 2, 2))


def transposed(**options: Any) -> Callable[[], nn.Module]:
    return lambda: S(nn.ConvTranspose1d(3, 6, 3, **options), Tanh(), nn.Conv1d(6, 2, 2))


def looked_up(kind: type[nn.Module] = nn.Embedding, **options: Any) -> Callable[[], nn.Module]:
    return lambda: S(kind(13, 6, **options), Tanh(), Linear(6, 3))


def lstm() -> nn.Module:
    return nn.LSTM(6, 5, batch_first=True)


SITUATIONS = {
    name: Situation(TEXT.get(name, name.replace("_", " ")), p.make, p.data, p.batch)
    for name, p in PROBLEMS.items()
}


def add(
    name: str, text: str, make: Callable[[], nn.Module], data: Callable[[int], Tensor], **rest: Any
) -> None:
    assert name not in SITUATIONS, name
    SITUATIONS[name] = Situation(text, make, data, **rest)


# fmt: off
add("conv_depthwise", "depthwise convolution", conv(groups=6), image)
add("conv_grouped", "grouped convolution", conv(groups=2), image)
for _mode in ("circular", "reflect", "replicate"):
    add(f"conv_{_mode}", f"padding_mode={_mode!r}", conv(padding=1, padding_mode=_mode), image)
add("transposed_groups", "transposed convolution with groups", transposed(groups=3), signal)
add("transposed_output_padding", "transposed convolution, output_padding",
    transposed(stride=2, output_padding=1), signal)
for _mode in ("sum", "mean", "max"):
    add(f"bag_{_mode}", f"EmbeddingBag, mode={_mode!r}", looked_up(nn.EmbeddingBag, mode=_mode), ids)
add("ids_1d", "Embedding, 1-D ids", looked_up(), lambda n: torch.randint(0, 13, (n,)))
add("sparse", "Embedding, sparse gradients", looked_up(sparse=True), ids)
add("by_frequency", "Embedding, scale_grad_by_freq", looked_up(scale_grad_by_freq=True), ids, exists=False)
add("batch_norm", "BatchNorm in training mode",
    lambda: S(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 2)), signal, exists=False)
add("norm_no_bias", "LayerNorm with bias=False",
    lambda: S(Linear(6, 6), nn.LayerNorm(6, bias=False), Tanh()), sequence)
add("weight_again", "a weight used by its module and F.linear",
    used(P.used_again, a=P.square, head=P.head), sequence)
add("flattened", "(B·T, D) inside the model", used(P.flattened, a=P.square, head=P.head), sequence)
add("packed", "packed sequences", looked_up(), lambda n: torch.randint(0, 13, (11,)), packed=P.PACKED,
    rows=lambda x: P.PACKED, loss=P.packed_loss, share=P.packed_share)
add("experts", "tokens gathered by expert", used(P.experts, a=P.head, b=P.head), sequence)
add("sequence_first", "sequence-first input", two, table, dim=1, loss=P.sequence_first_loss)
add("sequence_first_square", "sequence-first input, T = B", two, table, batch=7, dim=1,
    loss=P.sequence_first_loss)
add("two_forwards", "two live forwards, backward of the first", two, vectors, batch=6,
    script=P.first_of_two, measured=slice(4), functional=False)
add("forgotten", "a forward without backward before the step", two, vectors, script=P.forgotten,
    functional=False)
add("retained", "backward with retain_graph", two, vectors, script=P.retained, functional=False)
# Either what the last backward adds or both together is an answer.
add("backward_twice", "backward twice", two, vectors, script=P.twice, functional=False, accepted=(1.0, 4.0))
add("micro_batches", "uneven last micro-batch", two, vectors, script=P.micro_batches)
add("freezing", "parameters frozen between steps", two, vectors, script=P.freezing, frozen=("0.weight",))
add("skipped", "a layer that the step skips", used(P.long_only, a=P.square, head=P.head), sequence,
    script=P.skipping)
add("checkpoint", "checkpointing", P.checkpointed(False), sequence)
add("checkpoint_reentrant", "checkpointing, reentrant", P.checkpointed(True), sequence)
add("frozen_weights", "frozen weights, trained biases", lambda: P.half_frozen("weight"), sequence)
add("frozen_biases", "trained weights, frozen biases", lambda: P.half_frozen("bias"), sequence)
add("lora", "LoRA", P.lora, sequence)
add("token_mean", "ignore_index with mean over tokens", lambda: S(nn.Embedding(13, 6), Linear(6, 4)), ids,
    loss=P.token_loss, share=P.token_share)
add("one_sample", "batch of 1", two, sequence, batch=1)
add("no_sample", "batch of 0", two, vectors, batch=0,
    loss=lambda m, x: m(x).square().sum() / max(1, len(x)))
add("stride_0", "gradient with stride 0", two, sequence, loss=lambda m, x: m(x).sum() / len(x))
add("not_contiguous", "input that is not contiguous", two,
    lambda n: torch.randn(6, n, 7).permute(1, 2, 0))
add("autocast", "bfloat16 autocast", two, sequence, tolerance=5e-2,
    context=lambda: torch.autocast("cpu", torch.bfloat16))
add("half", "float16, squares above 65504", two, sequence, dtype=torch.float16, tolerance=5e-2,
    loss=lambda m, x: m(x).sum() * 400 / len(x))
add("cancelling", "bfloat16, positions that cancel", lambda: Linear(64, 4), P.close,
    dtype=torch.bfloat16, tolerance=5e-2, loss=P.cancelling_loss)
add("lstm_outputs", "nn.LSTM, loss of the outputs alone", used(lambda m, x: m.a(x)[0], a=lstm), sequence)
add("spectral_norm", "spectral_norm in eval mode", P.spectral, sequence)
# fmt: on
