"""The peers' ways to the same numbers, each as a training step of a model of its own.

A step leaves `sq_norm`, (B,), the squared norms in units where the gradient is the mean over the
samples; and with `moments` the mean over the samples of each weight's squared gradient. What a peer
cannot do raises `Refused`.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.errors import first_line
from gradstats.workbench.bench.models import Problem, mean_cross_entropy

GRAD_SAMPLE, SUM_GRAD_SQUARED = "grad_sample", "sum_grad_squared"  # as the peers call them


class Refused(Exception):
    """The peer is not installed, or does not take this model."""


class Step:
    """One training step of a copy of the problem's model. Subclasses add a way to statistics."""

    def __init__(self, problem: Problem, moments: bool = False) -> None:
        self.problem, self.moments = problem, moments
        self.model: nn.Module = copy.deepcopy(problem.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.sq_norm: Tensor | None = None
        self.measured: list[str] | None = None  # names of parameters, where not all
        self.mean_sq: dict[str, Tensor] = {}
        self.prepare()

    def prepare(self) -> None:
        """Set the tool up on `self.model`."""

    def backward(self) -> None:
        """Fill `p.grad` and the statistics."""
        self.problem.loss(self.model).backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Opacus(Step):
    """GradSampleModule: hooks that materialise every sample's gradient."""

    def wrap(self) -> Any:
        from opacus.grad_sample import GradSampleModule

        return GradSampleModule(self.model, loss_reduction="mean", strict=True)

    def prepare(self) -> None:
        logging.getLogger("opacus").setLevel(logging.ERROR)
        try:
            self.wrapped = self.wrap()
        except ImportError as error:
            raise Refused(f"not installed ({error.name})") from error
        except Refused:
            raise
        except Exception as error:
            raise Refused(first_line(error)) from error

    def backward(self) -> None:
        self.problem.loss(self.wrapped).backward()
        each = {n: getattr(p, GRAD_SAMPLE) for n, p in self.model.named_parameters()}
        self.sq_norm = sum_sq_norms(list(each.values()))
        if self.moments:
            self.mean_sq = {n: g.square().mean(0) for n, g in each.items()}

    def zero_grad(self) -> None:
        self.wrapped.zero_grad(set_to_none=True)


class OpacusGhost(Opacus):
    """GradSampleModuleFastGradientClipping: norms from Gram matrices where it has a sampler.

    Only its first backward runs, which is all that norms need.
    """

    def wrap(self) -> Any:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        if self.moments:
            raise Refused("norms only")
        return GradSampleModuleFastGradientClipping(
            self.model, loss_reduction="mean", strict=True, use_ghost_clipping=True
        )

    def backward(self) -> None:
        self.problem.loss(self.wrapped).backward()
        self.sq_norm = self.wrapped.get_norm_sample().square()


class BackPACK(Step):
    """BatchL2Grad, and SumGradSquared for second moments. Leaves out layers it does not know."""

    def prepare(self) -> None:
        try:
            from backpack import backpack, extend
            from backpack.extensions import BatchL2Grad, SumGradSquared
        except ImportError as error:
            raise Refused(f"not installed ({error.name})") from error
        self.context = backpack
        self.kinds = [BatchL2Grad, SumGradSquared] if self.moments else [BatchL2Grad]
        extend(self.model)

    def backward(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every layer that it does not know
            with self.context(*(kind() for kind in self.kinds)):
                self.problem.loss(self.model).backward()
        batch = len(self.problem.inputs)
        measured = {n: p for n, p in self.model.named_parameters() if hasattr(p, "batch_l2")}
        if not measured:
            raise Refused("knows none of its layers")
        self.measured = list(measured)
        self.sq_norm = torch.stack([p.batch_l2 for p in measured.values()]).sum(0) * batch**2
        if self.moments:
            self.mean_sq = {n: getattr(p, SUM_GRAD_SQUARED) * batch for n, p in measured.items()}

    def zero_grad(self) -> None:
        super().zero_grad()
        for p in self.model.parameters():
            for name in ("batch_l2", SUM_GRAD_SQUARED):
                if hasattr(p, name):
                    delattr(p, name)


class TorchFunc(Step):
    """vmap(grad): every sample's gradient at once, which also gives the mean gradient."""

    def prepare(self) -> None:
        named = {n: p.detach() for n, p in self.model.named_parameters()}

        def loss_of_one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            out = torch.func.functional_call(self.model, params, (x.unsqueeze(0),))
            return mean_cross_entropy(out, y.unsqueeze(0))

        each = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
        self.each = lambda: each(named, self.problem.inputs, self.problem.targets)

    def backward(self) -> None:
        each = self.each()
        for name, p in self.model.named_parameters():
            p.grad = each[name].mean(0)
        self.sq_norm = sum_sq_norms(list(each.values()))
        if self.moments:
            self.mean_sq = {n: g.square().mean(0) for n, g in each.items()}


def sum_sq_norms(each: list[Tensor]) -> Tensor:
    """(B,) from every parameter's (B, *shape)."""
    return torch.stack([g.flatten(1).norm(dim=1) for g in each]).square().sum(0)


PEERS: dict[str, Callable[..., Step]] = {
    "opacus hooks": Opacus,
    "opacus ghost": OpacusGhost,
    "backpack": BackPACK,
    "torch.func": TorchFunc,
}
PACKAGES = ("opacus", "backpack-for-pytorch")
