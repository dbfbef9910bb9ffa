"""A sink whose last row a Prometheus server can fetch as text."""

from __future__ import annotations

import re
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.integrations.extra import library
from gradstats.loggers import Row

__all__ = ["Prometheus"]

SHARE = "layer_share/"


class Prometheus:
    """Holds the numbers of the last row as gauges ``gradstats_noise_scale`` …; `serve` offers them.

    Layers' shares are one gauge, ``gradstats_layer_share``, with the label ``parameter``. Infinite numbers
    and NaN are part of the text format, and stay.

    Args:
        prefix: of the gauges' names.
        registry: of yours, instead of one for this sink alone.
        labels: the same for all gauges, such as ``{"run": "17"}``.
    """

    def __init__(
        self,
        *,
        prefix: str = "gradstats_",
        registry: Any = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        self._library = library("prometheus_client", "prometheus")
        self.registry = self._library.CollectorRegistry() if registry is None else registry
        self._prefix, self._labels = prefix, labels or {}
        self._gauges: dict[str, Any] = {}
        self._server: tuple[Any, Any] | None = None

    def __call__(self, row: Row, step: int) -> None:
        for name, value in {**row, "step": step}.items():
            labels = dict(self._labels)
            if name.startswith(SHARE):
                labels["parameter"] = name.removeprefix(SHARE)
                name = SHARE.rstrip("/")
            gauge = self._gauge(name, tuple(labels))
            (gauge.labels(**labels) if labels else gauge).set(value)

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Any:
        if name not in self._gauges:
            safe = self._prefix + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            text = f"{name} of the last row of gradstats.Log"
            self._gauges[name] = self._library.Gauge(safe, text, labels, registry=self.registry)
        return self._gauges[name]

    def serve(self, port: int = 9464, *, host: str = "127.0.0.1") -> str:
        """Begin to answer at http://host:port/metrics, which it returns; port 0 takes a free one.

        Anyone who can reach `host` can read the numbers.

        Raises InvalidArgumentError where it answers already, or the address cannot be used.
        """
        if self._server is not None:
            raise InvalidArgumentError("this sink is served already; close() it first")
        try:
            self._server = self._library.start_http_server(port, host, registry=self.registry)
        except (OSError, OverflowError) as error:
            raise InvalidArgumentError(
                f"{host}:{port} cannot be listened on ({error}); choose another port, or 0 for a free one"
            ) from error
        return f"http://{host}:{self._server[0].server_port}/metrics"

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()
