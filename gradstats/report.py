"""What `gradstats.check` found: per parameter, as a whole, as text and as JSON. Numbers and words only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Path = Literal["rule", "fallback", "frozen", "unused", "uncovered"]


@dataclass(frozen=True)
class LayerCheck:
    """One parameter, and how far what gradstats measures of it is from the truth.

    `path`: how it is measured. "rule": in the pass that computes its gradient; "fallback": one sample
    at a time, at `fallback_bytes` of per-sample gradients (of the whole module, for a batch of the
    size checked); "frozen": it takes no gradient; "unused": its gradient is zero; "uncovered": not
    measured, for `reason`.
    `error`: largest error of a sample's squared gradient norm, or of the gradient, over the largest
    true value, in the model's own dtype; `error_float64` the same in float64. None: not compared.
    """

    name: str
    module: str
    size: int
    path: Path
    error: float | None = None
    error_float64: float | None = None
    fallback_bytes: int = 0
    reason: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class CheckReport:
    """The result of `gradstats.check`; prints as a table and what to do.

    `ok`: everything trainable is measured and exact. `layers`: one entry per parameter. `problems`:
    what is wrong, where, and what to do, a sentence each; `notes`: what is good to know.
    `batch_dim`: the dimension of the inputs that holds the samples. `loss_reduction`: "mean", "sum",
    "weighted" (samples weigh differently, as with a mean over tokens), or None where the samples'
    own gradients do not add up to the batch's. `num_samples`: how many were compared (0: none could
    be), out of a batch of `batch_size`. `mixing`: the path of the module that mixes samples ("" is the
    model), or None. `dtype`: the model's own; `reference_dtype`: that of the plain gradients compared
    with.
    """

    layers: tuple[LayerCheck, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    batch_dim: int
    loss_reduction: Literal["mean", "sum", "weighted"] | None
    batch_size: int
    num_samples: int
    mixing: str | None
    dtype: str
    reference_dtype: str

    @property
    def ok(self) -> bool:
        """Whether everything trainable is measured and exact."""
        return not self.problems

    @property
    def attach_call(self) -> str:
        """The call of `attach` that fits what was found."""
        options = ["model"]
        if self.batch_dim:
            options.append(f"batch_dim={self.batch_dim}")
        if self.loss_reduction == "sum":
            options.append("loss_reduction='sum'")
        return f"gradstats.attach({', '.join(options)})"

    @property
    def sentence(self) -> str:
        """What it comes to."""
        trainable = [layer for layer in self.layers if layer.path != "frozen"]
        good = [a for a in trainable if a.path != "uncovered" and not a.wrong]
        if not self.ok:
            found = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
            if not self.num_samples:
                return f"{found}, and nothing could be compared: no number of this model can be trusted."
            return f"{found}; {len(good)} of {len(trainable)} trainable parameters are exact."
        text = f"All {len(trainable)} trainable parameters are measured"
        worst = [a.error_float64 for a in trainable if a.error_float64 is not None]
        if worst:
            text += f", exact to {max(worst):.0e} in float64"
        own = [a.error for a in trainable if a.error is not None]
        if own:
            text += f", to {max(own):.0e} in {self.dtype}"
        return f"{text}. Use {self.attach_call}."

    def as_json(self) -> dict[str, Any]:
        """The report as a dict that `json.dumps` takes; numbers that are not finite become null."""
        return {
            "ok": self.ok,
            "sentence": self.sentence,
            "attach": self.attach_call,
            **{k: _plain(v) for k, v in asdict(self).items()},
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table: parameter, module, path, error, error in float64."""
        return [
            (
                layer.name,
                layer.module,
                "WRONG " + layer.path if layer.wrong else _path(layer),
                _number(layer.error),
                _number(layer.error_float64),
            )
            for layer in self.layers
        ]

    @property
    def headings(self) -> tuple[str, str, str, str, str]:
        """Of the columns of `rows()`."""
        return "parameter", "module", "measured by", f"error, {self.dtype}", "error, float64"

    def remarks(self) -> list[str]:
        """What stands below the table."""
        compared = "no sample could be compared"
        if self.num_samples:
            compared = (
                f"{self.num_samples} of {self.batch_size} samples compared with plain autograd, one "
                f"at a time ({self.reference_dtype})"
            )
        reduction = self.loss_reduction or "not known"
        return [
            f"samples: dimension {self.batch_dim} of the inputs; loss reduction: {reduction}; "
            f"{compared}",
            *(f"note: {text}" for text in self.notes),
            *(f"problem: {text}" for text in self.problems),
            self.sentence,
        ]

    def __str__(self) -> str:
        table = [self.headings, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([*lines, "", *self.remarks()])


def _path(layer: LayerCheck) -> str:
    if layer.path == "fallback":
        return f"fallback, {layer.fallback_bytes / 1e6:.1f} MB"
    return layer.path


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
