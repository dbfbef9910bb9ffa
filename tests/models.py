"""Small models, one per situation that the rules and the fallback must get exactly right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from layers import (
    Attention,
    Bags,
    BilinearModel,
    ClassToken,
    CopiedPositions,
    CrossAttention,
    Custom,
    Decoder,
    Einsum,
    FrozenParts,
    Functional,
    InPlace,
    LaidOutPositions,
    OneSlice,
    Overlapping,
    Positions,
    Recurrent,
    RepeatedPositions,
    ScaledByOnePlus,
    Slices,
    ThreeInputs,
    Tied,
    Twice,
    eval_batch_norm,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def _images(*size: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, 3, *size)


def _sequence(n: int) -> Tensor:
    return torch.randn(n, 7, 6)


def _ids(n: int) -> Tensor:
    return torch.randint(0, 13, (n, 7))


@dataclass(frozen=True)
class Problem:
    make: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    ruled: bool = True  # served by rules alone
    compiles: bool = True  # if so, also under torch.compile(fullgraph=True)
    batch: int = 5


S = nn.Sequential
PROBLEMS = {
    "mlp": Problem(lambda: S(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
                   lambda n: torch.randn(n, 6)),
    "sequence": Problem(lambda: S(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3, bias=False)), _sequence),
    "four_dimensions": Problem(lambda: S(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)),
                               lambda n: torch.randn(n, 3, 2, 6)),
    "layer_norm": Problem(lambda: S(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)), _sequence),
    "layer_norm_wide": Problem(lambda: S(nn.LayerNorm((7, 6)), nn.Tanh(), nn.LayerNorm(6, bias=False),
                                         nn.LayerNorm(6, elementwise_affine=False)), _sequence),
    "rms_norm": Problem(lambda: S(nn.RMSNorm(6), nn.Linear(6, 6), nn.RMSNorm((7, 6)), nn.Tanh()),
                        _sequence),
    "group_norm": Problem(lambda: S(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Tanh(), nn.Flatten(),
                                    nn.Linear(8 * 9, 4)), _images(5, 5)),
    "group_norm_vectors": Problem(lambda: S(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh()),
                                  lambda n: torch.randn(n, 6)),
    "instance_norm": Problem(lambda: S(nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 2, 2)),
                             _images(4, 5)),
    "eval_batch_norm": Problem(eval_batch_norm, _images(6, 6)),
    "conv1d": Problem(lambda: S(nn.Conv1d(3, 4, 3, padding=2), nn.Tanh(), nn.Conv1d(4, 2, 2, stride=2)),
                      _images(9)),
    "conv2d": Problem(lambda: S(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, (2, 3), (2, 1))),
                      _images(6, 7)),
    "conv2d_same": Problem(lambda: S(nn.Conv2d(3, 4, (2, 3), padding="same"), nn.Tanh(),
                                 nn.Conv2d(4, 2, 3, padding="valid", dilation=2)), _images(6, 7)),
    "conv2d_modes": Problem(lambda: S(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(),
                                  nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh(),
                                  nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate")),
                            _images(5, 6)),
    "conv2d_groups": Problem(lambda: S(nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6),
                                   nn.Tanh(), nn.Conv2d(6, 4, 1, groups=2, bias=False)), _images(6, 6)),
    "conv3d": Problem(lambda: S(nn.Conv3d(3, 2, 2, padding=1), nn.Tanh(), nn.Conv3d(2, 2, 2, dilation=2)),
                      _images(3, 4, 4)),
    "conv_transpose": Problem(lambda: S(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.Tanh(),
                                    nn.ConvTranspose2d(4, 4, 2, groups=2, dilation=2)), _images(3, 4)),
    "padding_idx": Problem(lambda: S(nn.Embedding(13, 6, padding_idx=3), nn.Tanh(), nn.Linear(6, 3)),
                           _ids),
    "positions": Problem(Positions, _ids),
    "positions_one_row": Problem(lambda: Positions(one_row=True), _ids),
    "positions_as_long_as_the_batch": Problem(Positions, _ids, batch=7),
    "positions_laid_out": Problem(LaidOutPositions, _ids),
    "positions_copied": Problem(CopiedPositions, _ids),
    "positions_copied_as_long_as_the_batch": Problem(CopiedPositions, _ids, batch=7),
    "positions_repeated": Problem(RepeatedPositions, _ids),
    "custom": Problem(Custom, _sequence),
    "class_token": Problem(ClassToken, _sequence),
    "functional": Problem(Functional, lambda n: torch.randn(n, 4, 6)),
    "frozen_parts": Problem(FrozenParts, _sequence),
    "in_place": Problem(InPlace, _sequence),
    "twice": Problem(Twice, _sequence, ruled=False),
    "tied": Problem(Tied, _ids, ruled=False),
    "one_plus": Problem(ScaledByOnePlus, _sequence, ruled=False),
    "attention": Problem(Attention, _sequence),
    "lstm": Problem(Recurrent, _sequence, compiles=False),
    "lstm_deep": Problem(lambda: Recurrent(num_layers=2, bidirectional=True), _sequence, compiles=False),
    "lstm_projected": Problem(lambda: Recurrent(proj_size=4), _sequence, ruled=False),
    "gru": Problem(lambda: Recurrent(nn.GRU, num_layers=2, bias=False), _sequence, compiles=False),
    "rnn": Problem(lambda: Recurrent(nn.RNN, nonlinearity="relu"), _sequence, compiles=False),
    "bilinear": Problem(BilinearModel, _sequence),
    "cross_attention": Problem(CrossAttention, _sequence),
    "cross_attention_biases": Problem(lambda: CrossAttention(add_bias_kv=True), _sequence, ruled=False),
    "attention_of_three": Problem(lambda: ThreeInputs(wide=False), _sequence),
    "attention_with_widths": Problem(lambda: ThreeInputs(wide=True), _sequence),
    "transformer_layers": Problem(Decoder, _sequence),
    "einsum": Problem(Einsum, _sequence),
    "slices": Problem(Slices, _sequence),
    "slice_with_an_offset": Problem(OneSlice, _sequence),
    "slices_overlapping": Problem(Overlapping, _sequence, ruled=False),
    "embedding_bags": Problem(Bags, _ids, ruled=False),
    "weight_norm": Problem(lambda: S(weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)),
                           _sequence, ruled=False),
    "prelu": Problem(lambda: S(nn.Linear(6, 4), nn.PReLU(7), nn.Linear(4, 2),
                                  nn.PReLU()), _sequence),
}  # fmt: skip


def plain_layers() -> nn.Module:
    """(B, …, 5) → (B, …, 3): linear layers, one without a bias, and activations between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean over samples of a smooth function of the output that treats no two entries alike."""
    out = model(batch)
    n, like = out[0].numel(), {"dtype": out.dtype, "device": out.device}
    weights = torch.linspace(0.5, 1.5, n, **like).view(out[0].shape)
    return ((out - 0.3) * weights).square().flatten(1).sum(1).mean()
