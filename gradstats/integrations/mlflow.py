"""A sink that logs rows to MLflow."""

from __future__ import annotations

import time
from typing import Any

from gradstats.integrations.extra import library
from gradstats.integrations.metrics import PREFIX, metrics
from gradstats.loggers import Row

__all__ = ["MLflow"]

MOST = 1000  # metrics that a store takes at once


class MLflow:
    """Logs to a run (default: the active one, or a new one), under `prefix`, one batch for each row.

    Infinite numbers and NaN are left out: stores in SQL would keep the former as ±1.8e308.

    Args:
        run_id: of the run.
        client: an `mlflow.MlflowClient`, for a store other than the present tracking URI.
    """

    def __init__(
        self, run_id: str | None = None, *, client: Any = None, prefix: str = PREFIX
    ) -> None:
        mlflow = library("mlflow", "mlflow")
        self._entities = library("mlflow.entities", "mlflow")
        self._client = mlflow.MlflowClient() if client is None else client
        if run_id is None:
            run_id = (mlflow.active_run() or mlflow.start_run()).info.run_id
        self.run_id, self._prefix = run_id, prefix

    def __call__(self, row: Row, step: int) -> None:
        now = int(1000 * time.time())
        found = metrics(row, self._prefix, finite=True)
        batch = [self._entities.Metric(k, v, now, step) for k, v in found.items()]
        for first in range(0, len(batch), MOST):
            self._client.log_batch(self.run_id, metrics=batch[first : first + MOST])
