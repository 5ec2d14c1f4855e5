"""A training's telemetry as Prometheus metrics, at an address of the first rank's machine while it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from infra.errors import UserError

HOST, PORT = "FOVEA_METRICS_HOST", "FOVEA_METRICS_PORT"
"""Environment variables: where to listen, by default at 127.0.0.1:9400; 0.0.0.0 lets other machines read."""


class PrometheusTracker:
    """Gauges `fovea_NAME{run="..."}` of each step's numbers, and `fovea_step`.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run
        self._registry = client.CollectorRegistry()
        client.ProcessCollector(registry=self._registry)
        self._gauges: dict[str, Any] = {}
        host, port = os.environ.get(HOST, "127.0.0.1"), int(os.environ.get(PORT, "9400"))
        try:
            self._server, self._thread = client.start_http_server(port, host, self._registry)
        except OSError as error:
            remedy = f"give another port in {PORT}"
            raise UserError(f"runtime.trackers: prometheus: {host}:{port}: {error.strerror}; {remedy}") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in {"step": step, **values}.items():
            self._gauge(name).labels(run=self._run).set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            told = f"fovea_{re.sub('[^a-zA-Z0-9_]', '_', name)}"
            self._gauges[name] = self._client.Gauge(told, f"{name} of the last step", ["run"], registry=self._registry)
        return self._gauges[name]
