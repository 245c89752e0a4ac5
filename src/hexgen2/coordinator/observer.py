"""What is written down of a request that was answered whole: times, tokens, lengths; never text."""

from __future__ import annotations

import time

from hexgen2.coordinator.desk import Desk, Meter
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.exchange import Exchange
from hexgen2.coordinator.sizes import SizeEstimator
from hexgen2.coordinator.traffic import Served
from hexgen2.specs.routing import Path


class Observer:
    """For the metrics, the circuit breakers, the estimates of sizes, and whoever watches the load."""

    def __init__(self, meter: Meter, desk: Desk) -> None:
        self._meter = meter
        self._desk = desk
        self.sizes = SizeEstimator()

    def done(self, exchange: Exchange, path: Path, engine: Engine) -> None:
        """`engine` gave the last byte, along `path`."""
        self._desk.succeeded(path)
        self._tell_listener(exchange, path)
        labels = (engine.id, engine.endpoint.role)
        arrived = exchange.request.arrived
        self._meter.time("e2e", time.perf_counter() - arrived, *labels)
        first, last = exchange.first_token_at, exchange.last_token_at
        if first is None or last is None:
            return
        self._meter.time("ttft", first - arrived, *labels)
        generated = exchange.generated
        self._meter.count("output_tokens", by=generated)
        if generated > 1:
            self._meter.time("tpot", (last - first) / (generated - 1), *labels)

    def _tell_listener(self, exchange: Exchange, path: Path) -> None:
        listens = self._meter.listens
        if not (listens or self._desk.by_class):
            return
        self.sizes.observe(exchange.request, exchange.prompt_tokens)
        read: float | None = exchange.prompt_tokens
        if read is None:
            read = self.sizes.size(exchange.request).prompt_tokens
        if listens and read is not None:
            written = exchange.generated if exchange.answer_tokens is None else exchange.answer_tokens
            self._meter.served(Served(path, round(read), written))
