"""What is written down of a request that was answered whole: times, tokens, lengths; never text."""

from __future__ import annotations

import time

from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.exchange import Exchange
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.sizes import SizeEstimator
from hexgen2.coordinator.traffic import Served
from hexgen2.specs.routing import Path


class Observer:
    """For the metrics, the circuit breakers, the estimates of sizes, and whoever watches the load."""

    def __init__(self, metrics: Metrics, fleet: Fleet) -> None:
        self._metrics = metrics
        self._fleet = fleet
        self.sizes = SizeEstimator()

    def done(self, exchange: Exchange, path: Path, engine: Engine) -> None:
        """`engine` gave the last byte, along `path`."""
        self._fleet.succeeded(path)
        self._tell_listener(exchange, path)
        labels = (engine.id, engine.endpoint.role)
        arrived = exchange.request.arrived
        self._metrics.e2e.labels(*labels).observe(time.perf_counter() - arrived)
        first, last = exchange.first_token_at, exchange.last_token_at
        if first is None or last is None:
            return
        self._metrics.ttft.labels(*labels).observe(first - arrived)
        generated = exchange.generated
        self._metrics.output_tokens.inc(generated)
        if generated > 1:
            self._metrics.tpot.labels(*labels).observe((last - first) / (generated - 1))

    def _tell_listener(self, exchange: Exchange, path: Path) -> None:
        listener = self._metrics.listener
        if listener is None and not self._fleet.by_class:
            return
        self.sizes.observe(exchange.request, exchange.prompt_tokens)
        read: float | None = exchange.prompt_tokens
        if read is None:
            read = self.sizes.size(exchange.request).prompt_tokens
        if listener is not None and read is not None:
            written = exchange.generated if exchange.answer_tokens is None else exchange.answer_tokens
            listener.served(Served(path, round(read), written))
