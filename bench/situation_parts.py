"""What situations of conformance.py are made of: scripts, losses and models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from checkout import ROOT
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint


def _tests_models() -> Any:
    """tests/models.py, under a name of its own: there is a `models` in this folder as well."""
    sys.path.append(str(ROOT / "tests"))  # what it imports
    spec = importlib.util.spec_from_file_location("tests_models", ROOT / "tests" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


M = _tests_models()
PROBLEMS = M.PROBLEMS
Loss = Callable[[nn.Module, Tensor], Tensor]


def plain(tool: Any, batch: Tensor) -> None:
    tool.backward(tool.loss(batch), batch)


def first_of_two(tool: Any, batch: Tensor) -> None:
    first = tool.loss(batch[:4])
    second = tool.loss(batch[2:])  # alive during the backward of the first
    tool.backward(first, batch[:4])
    del second


def forgotten(tool: Any, batch: Tensor) -> None:
    tool.loss(batch[:2])
    tool.backward(tool.loss(batch), batch)


def retained(tool: Any, batch: Tensor) -> None:
    tool.backward(tool.loss(batch), batch, retain_graph=True)


def twice(tool: Any, batch: Tensor) -> None:
    value = tool.loss(batch)
    tool.backward(value, batch, retain_graph=True)
    tool.backward(value, batch)


def micro_batches(tool: Any, batch: Tensor) -> None:
    for part in batch.split([2, 2, 1]):
        tool.micro(tool.loss(part), part, len(part) / len(batch))


def freezing(tool: Any, batch: Tensor) -> None:
    tool.backward(tool.loss(batch), batch)
    tool.next_step()
    for name in tool.situation.frozen:
        tool.model.get_parameter(name).requires_grad_(False)
    tool.backward(tool.loss(batch), batch)


def skipping(tool: Any, batch: Tensor) -> None:
    longer = torch.cat([batch, batch], 1)
    tool.backward(tool.loss(longer), longer)
    tool.next_step()
    tool.backward(tool.loss(batch), batch)


@dataclass(frozen=True)
class Situation:
    text: str
    make: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    batch: int = 5
    loss: Loss = M.loss  # mean over the samples
    share: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = (
        None  # a sample's, in a whole batch
    )
    dim: int = 0  # of the batch that holds the samples: told to tools that can be told
    rows: Callable[[Tensor], Tensor] | None = None  # whose each row is, told likewise
    packed: Tensor | None = None  # rows of the input, if the samples have no dimension in it
    script: Callable[[Any, Tensor], None] = plain
    measured: slice = field(
        default_factory=lambda: slice(None)
    )  # the samples that the script asks for
    frozen: tuple[str, ...] = ()  # by the script, before its last step
    exists: bool = True  # whether the samples have gradients of their own
    functional: bool = True  # False: about forward and backward calls, which torch.func has none of
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    accepted: tuple[float, ...] = (
        1.0,
    )  # factors on the squared norms, where units are a matter of taste

    def count(self, batch: Tensor) -> int:
        return batch.shape[self.dim] if self.packed is None else int(self.packed.max()) + 1

    def sample(self, batch: Tensor, i: int) -> Tensor:
        if self.packed is not None:
            return batch[self.packed == i]
        return batch.narrow(self.dim, i, 1)

    def one(self, model: nn.Module, sample: Tensor, batch: Tensor) -> Tensor:
        """The loss whose gradient is the sample's, in units where p.grad is the mean gradient."""
        if self.share is not None:
            return self.share(model, sample, batch)
        return self.loss(model, sample)


class Used(nn.Module):
    """Modules by name and a forward of them."""

    told: Any = staticmethod(
        lambda ids: nullcontext()
    )  # whose rows, for a tool that can be told within

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.rule = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def used(
    forward: Callable[..., Tensor], **makers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return lambda: Used(forward, **{name: make() for name, make in makers.items()})


def square() -> nn.Module:
    return nn.Linear(6, 6)


def head() -> nn.Module:
    return nn.Linear(6, 3)


def lora() -> nn.Module:
    base = nn.Linear(6, 6).requires_grad_(False)
    parts = {"base": base, "a": nn.Linear(6, 2, bias=False), "b": nn.Linear(2, 6, bias=False)}
    return Used(lambda m, x: torch.tanh(m.base(x) + m.b(m.a(x))), **parts)


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)).eval()


def half_frozen(which: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    for layer in (model[0], model[2]):
        getattr(layer, which).requires_grad_(False)
    return model


def checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.first(x))
        return m.head(checkpoint(m.inner, x, use_reentrant=reentrant))

    inner = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))  # noqa: E731
    return used(forward, first=square, inner=inner, head=head)


def experts(m: Any, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    first = flat[:, 0] > 0
    out = torch.empty(len(flat), 3, dtype=x.dtype)
    ids = torch.arange(len(x)).repeat_interleave(x.shape[1])
    for module, rows in ((m.a, first), (m.b, ~first)):
        with m.told(ids[rows]):
            out[rows] = module(flat[rows])
    return out.view(*x.shape[:2], 3)


def token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets(ids).flatten(), ignore_index=-100)


def targets(ids: Tensor) -> Tensor:
    return torch.where(ids < 5, -100, ids % 4)


def token_share(model: nn.Module, one: Tensor, batch: Tensor) -> Tensor:
    out, y = model(one).flatten(0, 1), targets(one).flatten()
    summed = F.cross_entropy(out, y, ignore_index=-100, reduction="sum")
    return summed * len(batch) / (targets(batch) != -100).sum()


PACKED = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 1, 5, 2]))


def packed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).sin().sum() / 4


def packed_share(model: nn.Module, one: Tensor, batch: Tensor) -> Tensor:
    return model(one).sin().sum()


def sequence_first_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return M.loss(lambda x: model(x).transpose(0, 1), batch)


def close(n: int) -> Tensor:
    """Positions that differ little."""
    return torch.randn(n, 1, 64) + torch.randn(n, 16, 64) / 16


def cancelling_loss(model: nn.Module, x: Tensor) -> Tensor:
    signs = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat(8)[:, None]
    return (model(x) * signs).sum() / len(x)


def used_again(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.a(x)) + F.linear(x.sin(), m.a.weight))


def flattened(m: Any, x: Tensor) -> Tensor:
    rows = m.head(torch.tanh(m.a(x.reshape(-1, 6))))
    return rows.view(*x.shape[:2], 3)


def long_only(m: Any, x: Tensor) -> Tensor:
    """A path that short sequences do not take."""
    return m.head(m.a(x) if x.shape[1] > 7 else torch.tanh(x))
