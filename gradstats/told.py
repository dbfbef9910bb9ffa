"""What a user says of the samples of a forward: whose each row is, and which of them count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gradstats.errors import BatchDimError, InvalidArgumentError
from gradstats.grouping import Counted, Grouping
from gradstats.interpose import Interposer
from gradstats.source import Told
from gradstats.tokens import TokenInterposer


@contextmanager
def samples(interposer: Interposer, told: Told, moments: bool) -> Iterator[None]:
    """See `Monitor.samples`. Holds for the forwards inside the block, or the rest of the present one."""
    for name in ("ids", "cu_seqlens", "mask"):
        given = getattr(told, name)
        if given is not None and not isinstance(given, Tensor):
            raise InvalidArgumentError(
                f"samples({name}=) takes a tensor on the model's device, not {type(given).__name__}"
            )
    groups = _groups(interposer, told)
    counted = None if told.mask is None else _counted(interposer, told.mask, moments)
    if groups is None and counted is None:
        raise InvalidArgumentError("samples() needs ids=, cu_seqlens= or mask=")
    holder = interposer.current or interposer
    before = holder.groups, interposer.counted
    if groups is not None:
        holder.groups = groups
    if counted is not None:
        interposer.counted = counted
    try:
        yield
    finally:
        holder.groups, interposer.counted = before


def _groups(interposer: Interposer, told: Told) -> Grouping | None:
    ids, num_samples = told.ids, told.num_samples
    if told.cu_seqlens is not None:
        if ids is not None or num_samples is not None:
            raise InvalidArgumentError(
                "cu_seqlens= says all that ids= and num_samples= say. Pass it alone."
            )
        ids, num_samples = _ids(told.cu_seqlens)
    if ids is None:
        return None
    if isinstance(interposer, TokenInterposer):
        raise InvalidArgumentError(
            'samples(ids=...) says which rows are of one sample, and with sample="token" every row is '
            'a sample of its own. Leave it out, or attach with sample="example".'
        )
    around = interposer.samples_around()
    if num_samples is None:
        num_samples = int(ids.max()) + 1 if around is None and ids.numel() else around or 0
    if around is not None and num_samples != around:
        raise BatchDimError(
            f"samples(num_samples={num_samples}) within a forward of {around} samples. "
            "Leave num_samples out there."
        )
    return Grouping(ids, num_samples)


def _ids(cu_seqlens: Tensor) -> tuple[Tensor, int]:
    """The sample of each row, and how many samples there are. Waits for the device."""
    whole = cu_seqlens.dim() == 1 and cu_seqlens.numel() and not cu_seqlens.is_floating_point()
    lengths = cu_seqlens.diff() if whole else cu_seqlens
    if not whole or int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
        seen = (
            cu_seqlens.tolist() if cu_seqlens.numel() <= 8 else f"shape {tuple(cu_seqlens.shape)}"
        )
        raise BatchDimError(
            "cu_seqlens holds where each sequence begins, and the number of rows at its end, as "
            f"whole numbers that never fall: [0, 3, 4, 9]; this is {seen} of {cu_seqlens.dtype}."
        )
    count = lengths.numel()
    return torch.repeat_interleave(torch.arange(count, device=lengths.device), lengths), count


def _counted(interposer: Interposer, mask: Tensor, moments: bool) -> Counted:
    if interposer.current is not None:
        raise BatchDimError("samples(mask=...) goes around the model's forward, not into it.")
    if moments:
        raise InvalidArgumentError(
            "samples(mask=...) cannot be used with attach(moments=True), whose elementwise variance "
            "is over all rows. Attach without moments, or leave the samples out of the batch."
        )
    if mask.dtype != torch.bool:
        raise BatchDimError(
            f"samples(mask=...) holds True for each sample that counts, and not {mask.dtype} numbers. "
            "Pass labels != ignore_index or the like."
        )
    return Counted(mask)
