"""Exact statistics of any module without rules, at the memory of its per-sample gradients.

The module runs once per sample under `torch.func.vmap` (in a plain loop where vmap cannot), with its
parameters expanded to (chunk, ...). The expansion's backward sums over samples for the parameter's
gradient and squares for the probes, chunk by chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from gradstats import alike
from gradstats.calls import FallbackFailed, random_state, restore_random_state
from gradstats.errors import first_line
from gradstats.expand import Corrected, Expand, Merge, NoSample
from gradstats.interpose import Interposer
from gradstats.probes import ATTRIBUTE, CONSTANT, Probe

_TENSOR = object()


class FallbackWarning(UserWarning):
    """A module is measured by the fallback: exact, but not free."""


def run(
    interposer: Interposer, module: Any, path: str, original: Any, args: Any, kwargs: Any
) -> Any:
    """The output of `original(*args, **kwargs)`, computed sample by sample; see the module's text.

    Raises FallbackFailed where the module cannot be run this way: it mixes samples, or its inputs
    do not hold them.
    """
    plan = interposer.plans.get(path) or _Plan(interposer, module, path, original)
    if interposer.batch == 0:
        return plan.without_samples(args, kwargs)
    plan.prepare(args, kwargs)
    interposer.plans[path] = plan
    return plan(args, kwargs)


class _Ways(NamedTuple):
    """What a try has proven, for arguments of the same shapes as far as samples go."""

    batched: tuple[bool, ...]
    vectorised: bool
    out_dims: list[int]


class _Plan:
    """How one module is run by the fallback; made at its first run, kept for the later ones."""

    def __init__(self, interposer: Interposer, module: Any, path: str, original: Any) -> None:
        self.interposer, self.module, self.path, self.original = interposer, module, path, original
        self.vectorised = True
        self.out_dims: list[int] = []  # of the samples in each tensor that comes out; -1 for none
        self.batched: tuple[bool, ...] = ()  # which leaves of the arguments hold samples
        self.known: dict[Any, _Ways] = {}

    def prepare(self, args: Any, kwargs: Any) -> None:
        """Try out what was not met before: which arguments hold samples, as far as shapes tell.

        One sample alone does not show where the samples are in what comes out, and other sizes may
        coincide with the batch's.
        """
        it = self.interposer
        fits = tuple(
            isinstance(v, Tensor)
            and it.is_batched(v)
            and getattr(v, ATTRIBUTE, None) is not CONSTANT
            for v in pytree.tree_leaves((args, kwargs))
        )
        key = fits, it.batch > 1
        if key not in self.known:
            proven = {w.batched for w in self.known.values() if len(w.batched) == len(fits)}
            fewer = [
                w
                for w in proven
                if w != fits and all(f or not h for h, f in zip(w, fits, strict=True))
            ]
            for self.batched in (*fewer, fits):
                try:
                    self.try_out(args, kwargs)
                    break
                except FallbackFailed:
                    if self.batched is fits:
                        raise
            if not self.known:
                self._announce()
            self.known[key] = _Ways(self.batched, self.vectorised, self.out_dims)
        self.batched, self.vectorised, self.out_dims = self.known[key]

    # ---- the first run -----------------------------------------------------------------------

    def try_out(self, args: Any, kwargs: Any) -> None:
        """Compare outputs and gradients with the plain module's, on the same random numbers.

        Samples that influence each other show here: alone, each comes out differently. So does a
        function that vmap gets wrong.
        """
        state = random_state(self.interposer.device)
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        uses = dict(self.interposer.current.uses)  # type: ignore[union-attr]

        def restore() -> None:
            restore_random_state(state)
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])
            self.interposer.current.uses = dict(uses)  # type: ignore[union-attr]

        params = [p for _, p in self._parameters().values()]
        problems = []
        with torch.enable_grad():
            plain = self.original(*args, **kwargs)
            try:
                expected = alike.results(plain, params)
            except RuntimeError as error:  # as of a reentrant checkpoint
                problems = [first_line(error)] * 2
            for vectorised in (True, False) if not problems else ():
                restore()
                self.vectorised = vectorised
                try:
                    self._find_out_dims(plain, args, kwargs)
                    restore()
                    alike.require(alike.results(self(args, kwargs), params), expected)
                    break
                except Exception as error:
                    problems.append(first_line(error))
            restore()
        if len(problems) == 2:
            need = self.interposer.fallbacks[self.path]
            raise FallbackFailed(
                self.interposer.stack[-1],
                need,
                f"{need.reason}, and the per-sample fallback around {self.path or 'the model'!r} "
                "failed: " + "; as a loop: ".join(problems),
            )

    def _announce(self) -> None:
        size = self._bytes()
        chunk = self._chunk(self.interposer.batch)
        kind, need = type(self.module).__name__, self.interposer.fallbacks[self.path]
        warnings.warn(
            f"gradstats measures {self.path or 'the model'!r} ({kind}) sample by sample: "
            f"{need.name}: {need.reason}. Exact, at {size * chunk / 1e6:.1f} MB of "
            f"per-sample gradients for {chunk} samples at a time"
            + ("." if self.vectorised else ", in a loop because vmap cannot run it."),
            FallbackWarning,
            stacklevel=2,
        )

    def _find_out_dims(self, expected: Any, args: Any, kwargs: Any) -> None:
        """The dimensions that shrink where the module sees one sample.

        Raises ValueError where there is none in what carries gradients: they would be one sample's.
        """
        batch, default = self.interposer.batch, self.interposer.batch_dim
        leaves, spec = pytree.tree_flatten((args, kwargs))
        one = [
            v.narrow(default, 0, 1) if b else v for v, b in zip(leaves, self.batched, strict=True)
        ]
        with torch.no_grad():
            args, kwargs = pytree.tree_unflatten(one, spec)
            alone = self.original(*args, **kwargs)
        self.out_dims = []
        for t, u in zip(alike.tensors(expected), alike.tensors(alone), strict=True):
            fits = [d for d in (default, *range(t.dim())) if d < t.dim() and t.shape[d] == batch]
            self.out_dims.append(next((d for d in fits if u.shape[d] == 1), -1))
            if self.out_dims[-1] < 0 and t.requires_grad and batch > 1:
                raise ValueError(
                    f"a result of shape {tuple(t.shape)} does not hold {batch} samples"
                )

    # ---- every run ---------------------------------------------------------------------------

    def _parameters(self) -> dict[str, tuple[str, Tensor]]:
        """The module's trainable parameters: name in the model -> (name in the module, tensor)."""
        marked = ((n, p, getattr(p, ATTRIBUTE, None)) for n, p in self.module.named_parameters())
        return {m.name: (n, p) for n, p, m in marked if m is not None and p.requires_grad}

    def _places(self) -> dict[str, str]:
        """Every place of a trainable parameter (name in the module -> in the model), once each.

        A module that sits at several paths is one place: put there twice, what was there is lost.
        """
        found = {}
        for path, module in self.module.named_modules():
            for key, p in module._parameters.items():
                mark = getattr(p, ATTRIBUTE, None)
                if mark is not None and p.requires_grad:
                    found[f"{path}.{key}" if path else key] = mark.name
        return found

    def _bytes(self) -> int:
        return sum(p.numel() * p.element_size() for _, p in self._parameters().values())

    def cost(self, batch: int) -> int:
        """Bytes of per-sample gradients held at a time for `batch` samples."""
        return self._bytes() * self._chunk(batch)

    def names(self) -> list[str]:
        """The parameters measured this way, by their names in the model."""
        return list(self._parameters())

    def _chunk(self, batch: int) -> int:
        if not self.vectorised:
            return 1
        return max(1, min(batch, self.interposer.chunk_bytes // max(self._bytes(), 1)))

    def _probes(self, params: dict[str, tuple[str, Tensor]]) -> dict[str, Probe]:
        probe_of = self.interposer.probe_of
        return {n: probe_of(n, getattr(p, ATTRIBUTE).m2) for n, (_, p) in params.items()}

    def without_samples(self, args: Any, kwargs: Any) -> Any:
        """The module as it is, for a batch of none."""
        params = self._parameters()
        probes = self._probes(params)
        measured = {n: NoSample.apply(p, *probes[n]) for n, (_, p) in params.items()}
        places = {local: measured[n] for local, n in self._places().items()}
        with _reparametrize_module(self.module, places):
            return self.original(*args, **kwargs)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        it = self.interposer
        params = self._parameters()
        probes = self._probes(params)
        merges = {n: Merge() for n in params}
        places = self._places()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        batched = self.batched
        if not any(batched):
            raise ValueError(f"none of its inputs has {it.batch} samples in dim {it.batch_dim}")
        chunk = self._chunk(it.batch)
        outputs = []
        for start in range(0, it.batch, chunk):
            stop = min(start + chunk, it.batch)
            rows = {
                n: Expand.apply(p, *probes[n], start, stop, merges[n])
                for n, (_, p) in params.items()
            }
            expanded = {local: rows[n] for local, n in places.items()}
            part = [v.narrow(it.batch_dim, start, stop - start) if b else v
                    for v, b in zip(leaves, batched, strict=True)]  # fmt: skip
            outputs.append(self._run_chunk(expanded, part, batched, spec))
        return self._join(outputs)

    def _run_chunk(
        self, expanded: dict[str, Any], leaves: list[Any], batched: Sequence[bool], spec: Any
    ) -> Any:
        dim = self.interposer.batch_dim

        def one(params: dict[str, Tensor], values: list[Any]) -> Any:
            args, kwargs = pytree.tree_unflatten(values, spec)
            # As torch.func.functional_call does, but without running the module's hooks again.
            with Corrected(), _reparametrize_module(self.module, params):
                return self.original(*args, **kwargs)

        if not self.vectorised:
            return one({n: e[0] for n, e in expanded.items()}, leaves)

        shape: list[Any] = []  # of the output: leaves, with places for the tensors, and the spec

        def each(params: dict[str, Tensor], values: list[Tensor]) -> list[Tensor]:
            it = iter(values)
            full = [next(it).unsqueeze(dim) if b else v
                    for v, b in zip(leaves, batched, strict=True)]  # fmt: skip
            flat, out_spec = pytree.tree_flatten(one(params, full))
            shape[:] = [_TENSOR if isinstance(v, Tensor) else v for v in flat], out_spec
            return [v for v in flat if isinstance(v, Tensor)]

        values = [v for v, b in zip(leaves, batched, strict=True) if b]
        mapped = torch.func.vmap(each, in_dims=(0, dim), randomness="different")
        out = mapped(expanded, values)
        merged = iter(t.movedim(0, d).flatten(d, d + 1) if d >= 0 else t[0]
                      for t, d in zip(out, self.out_dims, strict=True))  # fmt: skip
        rest, out_spec = shape
        return pytree.tree_unflatten([next(merged) if v is _TENSOR else v for v in rest], out_spec)

    def _join(self, outputs: list[Any]) -> Any:
        if len(outputs) == 1:
            return outputs[0]
        spec = pytree.tree_structure(outputs[0])
        columns = zip(*(pytree.tree_leaves(o) for o in outputs), strict=True)
        dims = iter(self.out_dims)
        joined = []
        for column in columns:
            if not isinstance(column[0], Tensor):
                joined.append(column[0])
                continue
            dim = next(dims)
            joined.append(torch.cat(column, dim) if dim >= 0 else column[0])
        return pytree.tree_unflatten(joined, spec)
