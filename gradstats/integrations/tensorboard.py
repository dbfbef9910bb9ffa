"""A sink that writes rows to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradstats.integrations.extra import library
from gradstats.integrations.metrics import PREFIX, metrics
from gradstats.loggers import Row

__all__ = ["TensorBoard"]


class TensorBoard:
    """One scalar per number, under `prefix`. TensorBoard marks numbers that are not finite, and gets them.

    Args:
        log_dir: folder of a new `torch.utils.tensorboard.SummaryWriter`.
        writer: one of yours, instead; it is flushed but not closed.
    """

    def __init__(
        self, log_dir: str | Path | None = None, *, writer: Any = None, prefix: str = PREFIX
    ) -> None:
        library("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._own = writer is None
        self.writer = SummaryWriter(log_dir) if writer is None else writer
        self._prefix = prefix

    def __call__(self, row: Row, step: int) -> None:
        for name, value in metrics(row, self._prefix).items():
            self.writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Write what is held back, and close the writer where it is this sink's."""
        self.writer.flush()
        if self._own:
            self.writer.close()
