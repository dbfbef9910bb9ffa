"""The tools of conformance.py, by their documented interfaces, on a copy of a situation's model."""

from __future__ import annotations

import copy
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from situation_parts import Situation
from torch import Tensor, nn

import gradstats
from gradstats.workbench.bench.peers import Refused

Norms = dict[str, Tensor]  # squared, (B,), by parameter or by "all"


class Tool:
    """A tool on a copy of a model. What it finds is in units where p.grad is the mean gradient."""

    needs = "torch"
    statement = ""  # a part of a warning that says that numbers mean nothing

    def __init__(self, situation: Situation, model: nn.Module) -> None:
        self.situation, self.model = situation, copy.deepcopy(model)
        self.parts: list[Norms] = []
        self.net: Any = self.setup()

    def setup(self) -> Any:
        return self.model

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def loss(self, batch: Tensor) -> Any:
        with self.situation.context():
            return self.situation.loss(self.net, batch)

    def backward(self, value: Any, batch: Tensor, **options: Any) -> None:
        value.backward(**options)
        self.samples = self.situation.count(batch)

    def micro(self, value: Any, batch: Tensor, share: float) -> None:
        """A part of the step. Here: a step of its own, for tools that know no accumulation."""
        self.backward(value, batch)
        self.next_step()

    def next_step(self) -> None:
        self.parts.append(self.read())
        self.net.zero_grad(set_to_none=True)

    def read(self) -> Norms:
        raise NotImplementedError

    def found(self) -> Norms:
        if self.situation.script.__name__ != "micro_batches" or not self.parts:
            return self.read()
        return {n: torch.cat([part[n] for part in self.parts]) for n in self.parts[0]}

    def of_each(self, attribute: str) -> dict[str, Tensor]:
        """That attribute of every parameter with a gradient."""
        named = self.model.named_parameters()
        reached = {n: p for n, p in named if p.requires_grad and p.grad is not None}
        found = {n: getattr(p, attribute, None) for n, p in reached.items()}
        missing = [n for n, value in found.items() if value is None]
        if missing:
            raise Refused(f"no {attribute} of {', '.join(missing)}")
        return found


class GradStats(Tool):
    def setup(self) -> Any:
        self.monitor = gradstats.attach(self.model, batch_dim=self.situation.dim)
        if hasattr(self.model, "told"):
            self.model.told = self.monitor.samples
        return self.model

    def loss(self, batch: Tensor) -> Any:
        if self.situation.rows is None:
            return super().loss(batch)
        with self.monitor.samples(self.situation.rows(batch)):
            return super().loss(batch)

    def micro(self, value: Any, batch: Tensor, share: float) -> None:
        (value * share).backward()

    def read(self) -> Norms:
        stats = self.monitor.step()
        if stats.coverage.missing:
            name, why = next(iter(stats.coverage.missing.items()))
            raise Refused(f"not covered: {name}: {why}")
        layers = {n: layer.per_sample_sq_norm for n, layer in stats.layers.items()}
        return {**layers, "all": stats.per_sample_sq_norm}


class Opacus(Tool):
    """GradSampleModule: hooks that materialise every sample's gradient."""

    needs = "opacus"

    def setup(self) -> Any:
        from opacus.grad_sample import GradSampleModule

        logging.getLogger("opacus").setLevel(logging.ERROR)
        first = self.situation.dim == 0
        return GradSampleModule(self.model, batch_first=first, loss_reduction="mean")

    def read(self) -> Norms:
        def norms(g: Tensor | list[Tensor]) -> Tensor:
            return torch.cat([norms(x) for x in g]) if isinstance(g, list) else sq_norms(g)

        return {n: norms(g) for n, g in self.of_each("grad_sample").items()}


class OpacusGhost(Opacus):
    """GradSampleModuleFastGradientClipping: norms of Gram matrices where it has a rule."""

    def setup(self) -> Any:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

        logging.getLogger("opacus").setLevel(logging.ERROR)
        first = self.situation.dim == 0
        return Ghost(self.model, batch_first=first, loss_reduction="mean", use_ghost_clipping=True)

    def read(self) -> Norms:
        return {"all": self.net.get_norm_sample().double().square()}


class BackPACK(Tool):
    """BatchL2Grad, or the norms of BatchGrad: whichever serves."""

    needs = "backpack"
    statement = "in training mode"
    field = "batch_l2"

    def setup(self) -> Any:
        from backpack import extend

        return extend(self.model)

    def active(self) -> AbstractContextManager[Any]:
        from backpack import backpack
        from backpack.extensions import BatchGrad, BatchL2Grad

        return backpack(BatchL2Grad() if self.field == "batch_l2" else BatchGrad())

    def read(self) -> Norms:
        scale = self.samples**2
        norms = torch.Tensor.double if self.field == "batch_l2" else sq_norms
        return {n: scale * norms(g) for n, g in self.of_each(self.field).items()}


class BackPACKBatchGrad(BackPACK):
    field = "grad_batch"


class TorchFunc(Tool):
    """vmap(grad) of the loss of one sample."""

    def loss(self, batch: Tensor) -> Any:
        return None  # there are no calls of forward and backward

    def backward(self, value: Any, batch: Tensor, **options: Any) -> None:
        s = self.situation
        if s.packed is not None:
            raise Refused("samples are not a dimension of the input")
        named = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        whole = batch.detach()

        class Called:
            def __init__(self, params: dict[str, Tensor], model: nn.Module) -> None:
                self.params, self.model = params, model

            def __call__(self, x: Tensor) -> Tensor:
                return torch.func.functional_call(self.model, self.params, (x,))

        def loss_of_one(params: dict[str, Tensor], x: Tensor) -> Tensor:
            net: Any = Called(params, self.model)
            with s.context():
                return s.one(net, x.unsqueeze(s.dim), whole)

        each = torch.func.grad(loss_of_one)
        self.each = torch.func.vmap(each, in_dims=(None, s.dim), randomness="different")(
            named, batch
        )

    def next_step(self) -> None:
        self.parts.append(self.read())

    def read(self) -> Norms:
        return {n: sq_norms(g) for n, g in self.each.items()}


TOOLS: dict[str, tuple[type[Tool], ...]] = {  # the next way is tried where one refuses
    "gradstats": (GradStats,),
    "opacus hooks": (Opacus,),
    "opacus ghost": (OpacusGhost,),
    "BackPACK": (BackPACK, BackPACKBatchGrad),
    "torch.func": (TorchFunc,),
}


def sq_norms(g: Tensor) -> Tensor:
    return g.flatten(1).double().square().sum(1) if g.dim() > 1 else g.double().square()
