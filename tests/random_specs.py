"""What random models are made of: which parts follow each other, what they share, how they are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_parts import ON_IDS, PARTS, WIDTH, WORDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Use:
    """One step of the forward: `kind` says what runs; `of` may name an earlier step to share with.

    `sharing`: "own" (a module of its own), "again" (the module of step `of` once more), "tied" (an own
    module with that step's parameters where shapes agree), "functional" (that step's parameters
    through plain functions).
    """

    kind: str
    sharing: str = "own"
    of: int = 0
    recompute: str = ""  # a checkpoint around it: "reentrant" or "not reentrant"
    residual: bool = False


@dataclass(frozen=True)
class Spec:
    uses: tuple[Use, ...]
    micro_batches: tuple[int, ...]
    length: int
    on_ids: bool
    tied_head: bool
    frozen: tuple[int, ...]
    dtype: str
    backend: str
    moments: bool
    seed: int


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    on_ids = draw(st.booleans())
    kinds = [k for k in PARTS if on_ids or k not in ON_IDS]
    uses = []
    for i in range(draw(st.integers(1, 5))):
        sharing = (
            draw(st.sampled_from(["own", "own", "again", "tied", "functional"])) if i else "own"
        )
        uses.append(
            Use(
                draw(st.sampled_from(kinds)),
                sharing,
                draw(st.integers(0, i - 1)) if i else 0,
                draw(
                    st.sampled_from(
                        ["", "", "", "", "", "", "", "reentrant", *["not reentrant"] * 2]
                    )
                ),
                draw(st.booleans()),
            )
        )
    return Spec(
        tuple(uses),
        tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))),
        draw(st.integers(1, 7)),
        on_ids,
        on_ids and draw(st.booleans()),
        tuple(draw(st.lists(st.integers(0, 20), max_size=3))),
        draw(st.sampled_from(["float32", "float32", "float64", "autocast"])),
        draw(st.sampled_from(["reference", "cpu"])),
        draw(st.booleans()),
        draw(st.integers(0, 999)),
    )


class Model(nn.Module):
    """(B, T, WIDTH) numbers or (B, T) ids; out come (B, T, WIDTH), or (B, T, WORDS) of a tied head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.recomputes = spec, True
        self.tokens = nn.Embedding(WORDS, WIDTH) if spec.on_ids else None
        self.steps = nn.ModuleList()
        for use in spec.uses:
            if use.sharing == "again":
                self.steps.append(self.steps[use.of])
                continue
            module = PARTS["nothing" if use.sharing == "functional" else use.kind](spec.length)
            if use.sharing == "tied":
                _tie(module, self.steps[use.of])
            self.steps.append(module)
        self.head = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            for p in self.parameters():  # no zeros, no ones
                p += 0.1 * torch.randn(p.shape)
        trained = [p for p in self.steps.parameters()]
        for i in spec.frozen:
            if trained:
                trained[i % len(trained)].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        ids = x
        if self.tokens is not None:
            x = self.tokens(ids)
        for use, step in zip(self.spec.uses, self.steps, strict=True):
            y = torch.tanh(self._run(use, step, x, ids))
            x = x + y if use.residual else y
        if self.spec.tied_head:
            return F.linear(x, self.tokens.weight)
        return self.head(x)

    def _run(self, use: Use, step: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        if use.sharing == "functional":
            return functional(x, self.steps[use.of])
        reentrant = use.recompute == "reentrant"
        if self.recomputes and use.recompute and (x.requires_grad or not reentrant):
            return checkpoint(step, x, ids, use_reentrant=reentrant)
        return step(x, ids)


def _tie(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the parameters of `other` that have a name and a shape of its own."""
    theirs = dict(other.named_parameters())
    for name, p in list(module.named_parameters()):
        path, _, key = name.rpartition(".")
        if name in theirs and theirs[name].shape == p.shape:
            setattr(module.get_submodule(path), key, theirs[name])


def functional(x: Tensor, other: nn.Module) -> Tensor:
    """The parameters of another step in functions: products, scales, shifts, lookups."""
    for i, p in enumerate(other.parameters()):
        if p.shape == (WIDTH, WIDTH):
            x = F.linear(x, p) if i % 2 else x @ p
        elif p.shape == (WIDTH,):
            x = x * p if i % 2 else x + p
        elif p.dim() == 2 and p.shape[1] == WIDTH:
            x = torch.tanh(F.linear(x, p)) @ p
    return x
