"""The TorchFunctionMode that every module's forward enters, and the entry itself.

The outermost module that runs opens a pass (`gradstats.probes.Pass`) and enters the mode; nested
modules find it open. Inside, each torch function that receives a tracked parameter is computed by its
rule. What has no rule is measured by the vmap fallback around the smallest module that holds every
use of the parameter, or reported as not covered.

Parameters carry a mark in an attribute, so they are known wherever they are used; the rows they
deliver to belong to the pass that runs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradstats import backends, layout, shortcuts, tracing
from gradstats.calls import (
    FallbackFailed,
    NeedsFallback,
    function_name,
    random_state,
    restore_random_state,
    tensors_in,
    within,
)
from gradstats.errors import UnsupportedLayerError
from gradstats.grouping import Counted, Grouping
from gradstats.layout import NeedsLayout, Recorder
from gradstats.ops import ops
from gradstats.passes import Passes
from gradstats.probes import (
    ATTRIBUTE,
    CONSTANT,
    Frame,
    Ledger,
    Mark,
    Numbered,
    Pass,
    UseOf,
    new_leaf,
)
from gradstats.rules import RULES
from gradstats.uses import Answers

_keys = itertools.count()


class Interposer(Passes, Answers, TorchFunctionMode):
    """Sees every torch function of the model's forward. One per monitor.

    `aliases`: the parameters in the order of their rows, each with every name that it has.
    """

    def __init__(
        self,
        aliases: Mapping[str, Sequence[str]],
        batch_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        fallback: Callable[..., Any],
        chunk_bytes: int,
    ) -> None:
        super().__init__()
        self.key = f"interposer {next(_keys)}"  # a number may become a symbol in a graph
        tracing.live[self.key] = self
        self.aliases = aliases
        self.index = {name: i for i, name in enumerate(aliases)}
        self.batch_dim = batch_dim
        self.dtype, self.device = dtype, device
        self.ledger = Ledger()
        self.enabled = True
        self.suspended = False
        self.tracing = False
        self.shared: set[str] = set()
        self.current: Pass | None = None
        self.batch = 0  # samples in the current pass
        self.stack: list[Frame] = []
        self.settled: set[str] = set()
        self.fallbacks: dict[str, NeedsFallback] = {}
        self.plans: dict[str, Any] = {}  # how the fallback runs each of them
        self.uncovered: dict[str, str] = {}
        self._fallback = fallback
        self.chunk_bytes = chunk_bytes
        self.missed: dict[str, str] = {}
        self.marks: dict[str, Mark] = {}
        self.groups: Grouping | None = None  # of the forwards to come
        self.counted: Counted | None = None  # of the forwards to come, where not all samples count
        self.layouts: dict[str, str] = {}  # of flattened inputs, by the module that met them
        self.looked = False
        self.watching = False
        self.displaced: dict[str, int] = {}
        self.recorder: Recorder | None = None
        self._canonical = {alias: name for name, group in aliases.items() for alias in group}
        self.owners: dict[str, dict[str, Any]] = {}  # modules' parameters, by path
        self._inner: dict[str, list[str]] = {}
        self._passes: list[Pass] = []
        self.shortcuts = shortcuts.made(self, device)
        self.adopted: Callable[[str, Tensor], None] | None = None  # told of new parameter objects

    def __deepcopy__(self, memo: Any) -> None:
        """Copies and pickles of an attached model come without: their entries hold None."""

    def __reduce__(self) -> Any:
        return (_nobody, ())

    @property
    def sequences(self) -> int:
        """How many entries dimension `batch_dim` holds in the current pass."""
        return self.batch

    # ---- entering ----------------------------------------------------------------------------

    def enter(self, module: Any, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        """The forward of `module`, which sits at `path`; `original` is its own forward."""
        if self.recorder is not None:
            return self.recorder.enter(path, original, args, kwargs)
        if self.suspended or not self.enabled:
            return original(*args, **kwargs)
        if not torch.is_grad_enabled():
            if self.current is not None:
                self.current.skipped = True
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._enter_traced(path, original, args, kwargs)
        if self.current is not None:
            return self._enter_nested(module, path, original, args, kwargs)
        if self._was_within_fallback(path):
            return original(*args, **kwargs)
        if path in self.settled:
            return self._enter_looking(None, module, path, original, args, kwargs)[0]
        before = layout.State(module, self.device)
        self.displaced.clear()
        self.watching = self.groups is None and self.batch_dim == 0
        try:
            out, found = self._enter_looking(before, module, path, original, args, kwargs)
        finally:
            self.watching = False
        # Another dimension as long as the batch, or another order: do the samples stay in their places?
        told = found or self.groups is not None or self.batch_dim != 0 or self.sequences < 2
        inputs = () if told else tensors_in(*args, kwargs)
        displaced = self.displaced_sample()
        if displaced is not None or any(self.sequences in t.shape[1:] for t in inputs):
            state = layout.State(module, self.device)
            layout.find(self, state, original, args, kwargs, displaced or 0)
        return out

    def _enter_looking(
        self, before: layout.State | None, module: Any, path: str, original: Any, args: Any, kwargs: Any
    ) -> tuple[Any, bool]:  # fmt: skip
        """What the forward gives, and whether it had to be found out how flattened rows lie."""
        with contextlib.suppress(NeedsLayout):
            return self._enter_first(module, path, original, args, kwargs), False
        # Not while the exception is handled: a checkpoint that it came through would still be open.
        self._look(before or layout.State(module, self.device), original, args, kwargs)
        return self._enter_first(module, path, original, args, kwargs), True

    def _look(self, before: layout.State, original: Any, args: Any, kwargs: Any) -> None:
        self.looked = True
        self.layouts.update(layout.find(self, before, original, args, kwargs))

    def _enter_first(self, module: Any, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        known = None
        try:
            self.current = self._open(path, args, kwargs)
            self.batch = self.current.batch
            if self.batch == 0:  # says nothing of how samples are measured
                known = self.settled.copy(), self.fallbacks.copy()
            self.stack.clear()
            if self.shortcuts is not None and self._takes_shortcuts(self.current):
                now = self.current
                self.shortcuts.begin(now, now.rows, now.batch, now.uses, self.stack)
            with self:
                return self._enter_nested(module, path, original, args, kwargs)
        finally:
            if self.shortcuts is not None:
                self.shortcuts.end()
            if known is not None:
                self.settled, self.fallbacks = known
            if self.current is not None:
                self.current.inputs = ()
            self.current = None

    def _takes_shortcuts(self, current: Pass) -> bool:
        plain = self.batch_dim == 0 and self.positions is None and current.groups is None
        return plain and not current.recomputing and backends.serves("cpu")

    def _enter_traced(self, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        key = self.key
        from torch._dynamo.comptime import comptime  # the compiler is loaded by now, and only now

        comptime(lambda ctx: tracing.adopt(ctx))
        assert key is not None  # they are looked up by these names
        assert path is not None
        if self.current is not None:
            return self._traced(path, original, args, kwargs)
        groups = self.groups
        if self.counted is not None:
            raise UnsupportedLayerError(
                "samples(mask=...) does not reach into a compiled forward. Run the model uncompiled, "
                "or leave what fills the batch up out of it."
            )
        # Multiplying a tuple specialises a symbolic batch size: the rows need a number.
        size = self._batch_size("the model", args, kwargs) if groups is None else groups.batch
        batch = len((0,) * size)
        comptime(lambda ctx: tracing.ensure_shared_leaf(ctx))
        comptime(lambda ctx: tracing.note_in_checkpoints(ctx))
        number = ops.next_number(self.forwards)
        leaf = Numbered.apply(getattr(self, f"_leaf_{batch}"), number)
        self.current = Pass(batch, leaf, leaf.unbind(0), groups=groups)
        self.current.look_at(tensors_in(*args, kwargs), self.batch_dim)
        self.batch = batch
        self.tracing = True
        try:
            with self:
                out = self._traced(path, original, args, kwargs)
            if self.current.retrace:
                comptime(lambda ctx: tracing.trace_again(ctx))
            return out
        finally:
            self.current = None
            self.tracing = False

    def _traced(self, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        self.stack.append(Frame(path))
        try:
            if tracing.is_entered(self):
                return original(*args, **kwargs)
            with self:  # again: the compiler leaves it for what a checkpoint runs
                return original(*args, **kwargs)
        finally:
            self.stack.pop()

    def make_shared_leaf(self, batch: int) -> None:
        if not hasattr(self, f"_leaf_{batch}"):
            if not hasattr(self, "forwards"):
                self.forwards = torch.zeros((), dtype=torch.int64, device=self.device)
                torch._dynamo.mark_static_address(self.forwards)
            leaf = new_leaf(len(self.index) + 1, batch, self.dtype, self.device)
            leaf.register_post_accumulate_grad_hook(self.ledger.deliver_shared)
            setattr(self, f"_leaf_{batch}", leaf)

    def _enter_nested(self, module: Any, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        current = self.current
        assert current is not None
        self.adopt_at(path)
        if hasattr(type(module), "_get_fsdp_state"):
            # It has put in those of the modules in it too, which need not run: nn.MultiheadAttention
            # takes the weight of its `out_proj` by itself. Others are still in shards.
            for inner in self._below(path):
                self.adopt_at(inner, whole=True)
        state = None if path in self.settled else random_state(self.device)
        while True:  # once, but for a module whose first try shows that it needs the fallback
            frame = Frame(path)
            self.stack.append(frame)
            try:
                if path in self.fallbacks:
                    return self._run_fallback(module, path, original, args, kwargs)
                out = original(*args, **kwargs)
                self.settled.add(path)
                return out
            except NeedsFallback as need:
                if need.frame is not frame:
                    raise
                # Anew: the one that was raised holds the frames it came through, with their tensors.
                self.fallbacks[path] = NeedsFallback(frame, need.name, need.reason)
            except FallbackFailed as failed:
                if failed.frame is not frame:
                    raise
                del self.fallbacks[path]
                around = self.stack[-2] if len(self.stack) > 1 else None
                if around is not None and around.path not in self.settled:
                    raise NeedsFallback(around, failed.need.name, failed.reason) from None
                self.uncovered[failed.need.name] = failed.reason
            finally:
                self.stack.pop()
            # What an interrupted try had drawn and counted is undone.
            restore_random_state(state)
            kept = {n: tuple(u for u in used if frame not in u.frames)
                    for n, used in current.uses.items()}  # fmt: skip
            current.uses.clear()  # in place: shortcuts know it
            current.uses.update({n: used for n, used in kept.items() if used})
            for name, joint in current.joints.items():
                joint.uses = len(current.uses.get(name, ()))

    def _below(self, path: str) -> list[str]:
        """The modules in the module at `path`."""
        found = self._inner.get(path)
        if found is None:
            found = [p for p in self.owners if p != path and within(p, path)]
            self._inner[path] = found
        return found

    def adopt_at(self, path: str, *, whole: bool = False) -> None:
        """Know the objects that are parameters of the module at `path` now, as fully_shard puts them in.

        `whole`: only those that are not in shards.
        """
        for key, param in self.owners[path].items():
            if param is None or getattr(param, ATTRIBUTE, None) is not None:
                continue
            if not (whole and hasattr(param, "to_local")):
                self._adopt(f"{path}.{key}" if path else key, param)

    def place(self, path: str, key: str) -> shortcuts.Place | None:
        """The parameter that the module at `path` has as `key`, if it is measured."""
        name = self._canonical.get(f"{path}.{key}" if path else key)
        return None if name is None else (name, self.marks[name], self.index[name])

    def _adopt(self, alias: str, param: Tensor) -> None:
        """A parameter is known by where it sits: a new object in an old place is the same one."""
        name = self._canonical.get(alias)
        if name is not None:
            setattr(param, ATTRIBUTE, self.marks[name])
            if self.adopted is not None:
                self.adopted(name, param)

    def _run_fallback(self, module: Any, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        assert self.current is not None
        self.suspended = True
        try:
            out = self._fallback(self, module, path, original, args, kwargs)
        finally:
            self.suspended = False
        self.current.by_fallback.add(path)
        return out

    # ---- torch functions ---------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.current is None or self.suspended:
            return func(*args, **kwargs)
        found = RULES.get(func)
        if found is None or not torch.is_grad_enabled():
            return self.unruled(func, args, kwargs)
        return found(self, func, *args, **kwargs)

    def unruled(self, func: Any, args: Any, kwargs: Any, reason: str = "") -> Any:
        """Run `func`; where a parameter goes into a differentiable result, its use is not covered."""
        out = func(*args, **kwargs)
        changed = args[0] if args and (out is None or out is args[0]) else None
        constant = True
        for tensor in tensors_in(*args, kwargs):
            mark = getattr(tensor, ATTRIBUTE, None)
            if mark is None:
                constant = False
            elif mark.name is not None:
                constant = False
                if tensor.requires_grad and any(t.requires_grad for t in tensors_in(out)):
                    why = reason or f"no rule covers its use in {function_name(func)}"
                    self._fall_back_or_note(mark.name, why, ())
        if constant and isinstance(out, Tensor) and not out.requires_grad:
            setattr(out, ATTRIBUTE, CONSTANT)  # made from nothing that a sample went into
        elif getattr(changed, ATTRIBUTE, None) is CONSTANT:
            delattr(changed, ATTRIBUTE)  # a sample was written into it
        return out

    def _fall_back_or_note(self, name: str, reason: str, earlier: tuple[UseOf, ...]) -> None:
        """Ask for the fallback around the smallest module with every use, else note the gap."""
        if not torch.is_grad_enabled() or name in self.uncovered:
            return
        assert self.current is not None
        if torch.compiler.is_compiling():
            if len(earlier) and name not in self.shared:
                self._found_shared(name)
                return
            self.uncovered[name] = f"{reason}; the fallback does not run in a compiled forward"
            return
        for frame in reversed(self.stack):
            owned = any(within(alias, frame.path) for alias in self.aliases[name])
            if owned and all(frame in use.frames for use in earlier):
                if frame.path not in self.settled:
                    raise NeedsFallback(frame, name, reason)  # unnamed: it would hold itself
                # Its first part already ran and drew random numbers; the next pass falls back.
                self.fallbacks[frame.path] = NeedsFallback(frame, name, reason)
                break
        self.missed[name] = reason

    def _found_shared(self, name: str) -> None:
        assert self.current is not None
        self.current.retrace = True
        key = self.key
        from torch._dynamo.comptime import comptime

        comptime(lambda ctx: tracing.note_shared(ctx))
        assert key is not None


def _nobody() -> None:
    return None
