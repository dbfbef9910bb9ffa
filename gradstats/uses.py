"""What rules ask of the forward pass that they run in (`gradstats.rules.Use`), answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradstats import layout
from gradstats.calls import NeedsFallback, named, within
from gradstats.errors import BatchDimError, UnsupportedLayerError
from gradstats.grouping import Flattened, Grouping, Packed
from gradstats.layout import NeedsLayout
from gradstats.probes import ATTRIBUTE, NO_PROBE, Frame, Mark, Part, Pass, Probe, UseOf
from gradstats.rules.chain import Chain, Floor
from gradstats.rules.joint import Joint


class Answers:
    """The half of the interposer that rules see."""

    index: dict[str, int]  # rows of the parameters, by name
    current: Pass | None
    batch: int
    batch_dim: int
    positions: tuple[int, int] | None = None
    stack: list[Frame]
    layouts: dict[str, str]  # of flattened inputs, by the module that met them
    looked: bool  # for those layouts
    watching: bool  # for functions that put samples into another order: in a first forward
    fallbacks: dict[str, NeedsFallback]
    displaced: dict[str, int]  # a sample that one of them displaced, by the module that called it
    tracing: bool  # a graph is compiled
    shortcuts: Any  # of the compiled extension, or None
    shared: set[str]  # parameters that some compiled graph uses several times

    def _fall_back_or_note(self, name: str, reason: str, earlier: tuple[UseOf, ...]) -> None:
        raise NotImplementedError

    def mark(self, tensor: object) -> Mark | None:
        return getattr(tensor, ATTRIBUTE, None) if isinstance(tensor, Tensor) else None

    def tracked(self, *tensors: object) -> bool:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                mark = getattr(tensor, ATTRIBUTE, None)
                if mark is not None and mark.name is not None:
                    return True
        return False

    def probe(self, tensor: Tensor | None) -> Probe:
        if tensor is None or not tensor.requires_grad:
            return NO_PROBE
        mark = getattr(tensor, ATTRIBUTE, None)
        if mark is None or mark.name is None:
            return NO_PROBE
        return self.probe_of(mark.name, mark.m2, mark.part)

    def joint(self, tensor: Tensor | None) -> Joint | None:
        if tensor is None or not tensor.requires_grad or not tensor.is_leaf:
            return None
        current, mark = self.current, getattr(tensor, ATTRIBUTE, None)
        # Elementwise moments of several uses have no such factors; a graph cannot keep them.
        if mark is None or mark.name is None or mark.ids is not None or mark.m2 is not None:
            return None
        assert current is not None
        if current.recomputing or self.tracing:
            return None
        joint: Joint | None = current.joints.get(mark.name)
        if joint is None:
            joint = current.joints[mark.name] = Joint()
            if self.shortcuts is not None and self.shortcuts.link(self.index[mark.name], joint):
                joint.uses = 1  # the shortcut's
        joint.uses += 1
        return joint

    def chain(self, tensor: Tensor | None) -> Chain | None:
        assert self.current is not None
        mark = self.mark(tensor)
        if (
            tensor is None
            or not tensor.requires_grad
            or mark is None
            or mark.name not in self.shared
        ):
            return None
        if not tensor.is_leaf or mark.ids is not None or mark.m2 is not None:
            return None
        joints, rows, at = self.current.joints, self.current.rows, self.index[mark.name]
        chain: Chain = joints.setdefault(mark.name, Chain(tensor.shape[0]))
        chain.uses += 1
        # Uses add up to one delivery, which the first counts as.
        row = Floor.apply(rows[at]) if chain.uses == 1 else rows[at]
        if chain.uses == 2:
            row = torch.cat((row[:-1], row.new_zeros(1)))
        self.current.rows = (*rows[:at], row, *rows[at + 1 :])
        return chain

    def probe_of(self, name: str, m2: Tensor | None, part: Part | None = None) -> Probe:
        """The probe of a parameter by name, or of a part of it; counts as a use of that."""
        current = self.current
        assert current is not None
        earlier = current.uses.get(name, ())
        row = current.rows[self.index[name]]
        if not current.recomputing:
            joint = current.joints.get(name)
            joined = joint is not None and joint.uses == len(earlier) + 1
            if not joined and any(use.overlaps(part) for use in earlier):
                self._fall_back_or_note(name, "it is used more than once in a forward", earlier)
            current.uses[name] = (*earlier, UseOf(tuple(self.stack), part))
        # The norms of parts add up, and count as one delivery: that of the part used first. What is
        # recomputed does not know which that was; there it is the one at the beginning.
        counted = len(earlier) == 0 if not current.recomputing else part is None or part[1] == 0
        if part is not None and not counted:
            row = torch.cat((row[:-1], row.new_zeros(1)))
        return Probe(row, m2)

    def is_batched(self, tensor: Tensor) -> bool:
        return tensor.dim() > self.batch_dim and tensor.shape[self.batch_dim] == self.batch

    def note_displaced(self, sample: int) -> None:
        self.displaced.setdefault(self.stack[-1].path, sample)

    def displaced_sample(self) -> int | None:
        """One that this forward put elsewhere, but for modules that run sample by sample."""
        for path, sample in self.displaced.items():
            if not any(path == one or within(path, one) for one in self.fallbacks):
                return sample
        return None

    def told(self) -> bool:
        return self.current is not None and self.current.groups is not None

    def is_flattened(self, tensor: Tensor) -> bool:
        return self._groups(tensor) is not None

    def grouped(self, tensor: Tensor) -> tuple[Tensor, Callable[[Any], Any]]:
        groups = self._groups(tensor)
        if groups is None:
            self.batch_first(tensor)
            return tensor, _as_it_is
        return groups.gather(tensor), groups.scatter

    def _groups(self, tensor: Tensor) -> Grouping | Packed | Flattened | None:
        """The samples of a tensor whose rows are not samples, where they are known."""
        assert self.current is not None
        groups, rows = self.current.groups, tensor.shape[0] if tensor.dim() else 0
        if groups is not None:
            features = int(tensor.is_floating_point())
            if rows == 1 and tensor.dim() > 1 + features and tensor.shape[1] == groups.rows:
                return Packed(groups)
            return groups if rows == groups.rows else None
        if rows <= self.batch or self.batch < 1 or rows % self.batch or self.batch_dim != 0:
            return None
        if self.batch == 1:
            return Flattened(1, samples_first=True)  # whatever they are, they are that sample's
        found = self.layouts.get(self.stack[-1].path)
        if found is None and not self.looked:
            if self.tracing:  # which has no numbers to look at
                return None
            raise NeedsLayout
        if found is None or found == layout.WITHOUT_SAMPLES:
            return None
        return Flattened(self.batch, samples_first=found == layout.SAMPLES_FIRST)

    def is_ambiguous(self, tensor: Tensor) -> bool:
        assert self.current is not None
        return self.current.square and all(tensor is not t for t in self.current.inputs)

    def batch_first(self, tensor: Tensor) -> Tensor:
        if not self.is_batched(tensor):
            first = "run one forward before you compile, which finds flattened rows; "
            raise BatchDimError(
                f"{self._where()} got an input of shape {tuple(tensor.shape)}, whose dimension "
                f"{self.batch_dim} does not hold the batch of {self.batch} samples. Every layer must "
                f"see the samples in that dimension: {first if self.tracing else ''}keep (batch, ...) inside "
                "the model, say where they are with attach(batch_dim=...), or which sample each row is of "
                "with monitor.samples(ids=...)."
            )
        return tensor if self.batch_dim == 0 else tensor.movedim(self.batch_dim, 0)

    def refuse(self, what: str, instead: str) -> NoReturn:
        raise UnsupportedLayerError(f"{self._where()}: {what}. Instead, {instead}.")

    def _where(self) -> str:
        return named(self.stack[-1].path if self.stack else "")


def _as_it_is(result: Any) -> Any:
    return result
