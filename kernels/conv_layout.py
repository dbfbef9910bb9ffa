"""How a convolution's tensors lie for the kernels: three spatial dimensions, channels last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv

Three = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """A 1-, 2- or 3-d convolution as a 3-d one: sizes (depth, height, width)."""

    kernel: Three
    stride: Three
    padding: Three
    dilation: Three
    groups: int
    dims: int  # spatial dimensions that there really are

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    def span(self, d: int) -> int:
        """Input positions from the first to the last tap."""
        return (self.kernel[d] - 1) * self.dilation[d] + 1


def three(values: Sequence[int], missing: int) -> Three:
    d, h, w = (missing,) * (3 - len(values)) + tuple(values)
    return d, h, w


def collapse(t: Tensor) -> Tensor:
    """(B, C, *spatial) with three spatial dimensions."""
    while t.dim() < 5:
        t = t.unsqueeze(2)
    return t


def patches(x: Tensor, geometry: Geometry, out: Three) -> Tensor | None:
    """(B, positions, I·taps) where no input is in two patches, so that this is no larger than x.

    For a pointwise convolution it is a view.
    """
    if any(geometry.padding) or geometry.groups > 1:
        return None
    for d in range(3):
        if out[d] > 1 and geometry.stride[d] < geometry.span(d):
            return None
    for d in range(3):
        x = x.unfold(2 + d, geometry.span(d), geometry.stride[d])
        x = x[..., :: geometry.dilation[d]]
    batch, channels = x.shape[:2]
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(batch, prod(out), channels * geometry.taps)


def channels_last(t: Tensor, groups: int, unit: int) -> tuple[Tensor, int]:
    """(B, C, D, H, W) as it is or as a copy, a group's channels `width` apart; returns both.

    Kernels read runs of channels: where these lie apart, or for 16-bit types out of step with
    `unit` channels, one copy (zero-padded) costs less than slow loads for every tap.
    """
    width = t.shape[1] // groups
    strides = [t.stride(d) for d in range(5) if d != 1 and t.shape[d] > 1]
    if t.shape[1] == 1 or t.stride(1) == 1:
        in_step = all(s % unit == 0 for s in strides) and t.data_ptr() % 16 == 0
        if t.element_size() > 2 or (in_step and (width % unit == 0 or groups == 1)):
            return t, width
    batch, _, *size = t.shape
    wide = cdiv(width, unit) * unit if t.element_size() == 2 else width
    new = (t.new_empty if wide == width else t.new_zeros)(batch, *size, groups, wide)
    new[..., :width] = t.unflatten(1, (groups, width)).permute(0, 3, 4, 5, 1, 2)
    return new.flatten(4).permute(0, 4, 1, 2, 3), wide


def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) with n // d == (umulhi(n, magic) + n) >> shift for 0 ≤ n < 2³¹
    (Granlund & Montgomery 1994).
    """
    shift = (d - 1).bit_length()
    return (2**32 * (2**shift - d)) // d + 1, shift


def arguments(x: Tensor, g: Tensor, geometry: Geometry) -> dict[str, Any]:
    """What every kernel here takes of the geometry; x is (B, C, D, H, W), g (B, O, *out)."""
    (magic_h, shift_h), (magic_w, shift_w) = divisor(g.shape[3]), divisor(g.shape[4])
    named: dict[str, Any] = {}
    for i, d in enumerate("dhw"):
        named |= {f"size_{d}": x.shape[2 + i], f"stride_{d}": geometry.stride[i],
                  f"pad_{d}": geometry.padding[i], f"dil_{d}": geometry.dilation[i],
                  f"x_{d}": x.stride(2 + i)}  # fmt: skip
    return named | {
        "x": x, "x_b": x.stride(0), "kernel_h": geometry.kernel[1], "kernel_w": geometry.kernel[2],
        "taps": geometry.taps, "len_s": prod(g.shape[2:]), "out_h": g.shape[3],
        "out_w": g.shape[4], "magic_h": magic_h, "shift_h": shift_h, "magic_w": magic_w,
        "shift_w": shift_w, "DIMS": geometry.dims,
    }  # fmt: skip


def check_size(op: str, x: Tensor, g: Tensor) -> None:
    """Positions within a sample are counted in 32 bits; offsets, which multiply them, in 64."""
    for name, t in (("x", x), ("g", g)):
        if prod(t.shape[2:]) >= 2**31:
            _common.refuse(op, f"{name} has {prod(t.shape[2:])} positions per sample",
                           "At most 2³¹ − 1; use the reference backend")  # fmt: skip


@triton.jit
def first_tap(
    s, out_h, out_w, magic_h, shift_h, magic_w, shift_w, stride_d, stride_h, stride_w,
    pad_d, pad_h, pad_w, DIMS: tl.constexpr,
):  # fmt: skip
    """Input coordinates (depth, height, width) that output positions s see through tap 0."""
    row = s * 0
    if DIMS > 1:
        n = s.to(tl.uint32)
        row = ((tl.umulhi(n, tl.full(n.shape, magic_w, tl.uint32)) + n) >> shift_w).to(tl.int32)
    w = (s - row * out_w) * stride_w - pad_w
    plane = row * 0
    if DIMS > 2:
        n = row.to(tl.uint32)
        plane = ((tl.umulhi(n, tl.full(n.shape, magic_h, tl.uint32)) + n) >> shift_h).to(tl.int32)
    return plane * stride_d - pad_d, (row - plane * out_h) * stride_h - pad_h, w


@triton.jit
def inside(d, h, w, size_d, size_h, size_w, DIMS: tl.constexpr):
    """Which coordinates are not in the padding; one comparison each, negative ones being huge."""
    found = w.to(tl.uint32) < size_w
    if DIMS > 1:
        found &= h.to(tl.uint32) < size_h
    if DIMS > 2:
        found &= d.to(tl.uint32) < size_d
    return found
