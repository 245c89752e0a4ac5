"""Traces across the legs, with OpenTelemetry's in-memory exporter."""

from __future__ import annotations

import asyncio
import http.server
import threading
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hexgen2.coordinator import Coordinator, Tracing
from hexgen2.coordinator.tracing import NO_TRACE
from hexgen2.emulator import Fault
from hexgen2.specs.errors import InputError
from tests.waiting import until

from .conftest import Stand, expected, running, text_of

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A coordinator that traces before the engines of a stand."""

    def __init__(self, stand: Stand) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracing = Tracing(provider.get_tracer("test"), provider)
        self.coordinator = Coordinator(stand.coordinator.config, tracing=tracing)

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name.removeprefix("hexgen2."): span for span in self.exporter.get_finished_spans()}


def parents(spans: dict[str, ReadableSpan]) -> dict[str, str]:
    by_id = {span.context.span_id: name for name, span in spans.items() if span.context}
    return {name: by_id.get(span.parent.span_id, "?") if span.parent else "" for name, span in spans.items()}


def in_order(*spans: ReadableSpan) -> bool:
    times = [span.start_time or 0 for span in spans]
    return times == sorted(times)


def header(stand: Stand, group: str) -> str:
    return stand.engines[group].received[-1].headers["traceparent"]


def as_header(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_request_is_one_trace_over_both_legs(pair: Stand, stream: bool) -> None:
    traced = Traced(pair)
    async with traced.coordinator.running() as door:
        pair.coordinator = door
        body = {"prompt": "a secret prompt", "max_tokens": 4, "stream": stream}
        status, _, _ = await pair.post("/v1/completions", body, traceparent=CLIENT, tracestate="a=1")
        assert status == 200
        await until(lambda: "request" in traced.spans())
    spans = traced.spans()
    assert parents(spans) == {
        "request": "?",  # the client's span
        "queue": "request",
        "leg_1": "request",
        "kv_handoff": "request",
        "leg_2": "request",
    }
    assert in_order(spans["request"], spans["queue"], spans["leg_1"], spans["kv_handoff"], spans["leg_2"])
    root = spans["request"]
    assert root.parent is not None
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" == CLIENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CLIENT.split("-")[2]
    assert dict(root.attributes or {})["hexgen2.status"] == "200"
    assert dict(spans["leg_1"].attributes or {}) == {"hexgen2.group": "p0", "hexgen2.role": "prefill"}
    # The engines go on with the legs' spans.
    assert (header(pair, "p0"), header(pair, "d0")) == (as_header(spans["leg_1"]), as_header(spans["leg_2"]))
    assert pair.engines["d0"].received[-1].headers["tracestate"] == "a=1"
    for span in spans.values():
        assert "secret" not in span.to_json()


async def test_retries_migrations_and_failed_legs_show() -> None:
    async with running({"c0": 0.5, "c1": 0.5}) as stand:
        traced = Traced(stand)
        async with traced.coordinator.running() as door:
            stand.coordinator = door
            stand.engines["c0"].fault = Fault("http_500", times=1)
            stand.engines["c1"].fault = Fault("error_event", after_tokens=2, times=1)
            assert text_of(await stand.stream("a", max_tokens=6)) == expected("a", 6)
            await until(lambda: "request" in traced.spans())
    events = [(event.name, dict(event.attributes or {})) for event in traced.spans()["request"].events]
    assert [name for name, _ in events] == ["retry", "migration"]
    assert events[0][1] == {"reason": "http_5xx", "group": "c0", "path": "c1"}
    assert events[1][1]["tokens"] == 2
    legs = [span for span in traced.exporter.get_finished_spans() if span.name == "hexgen2.leg"]
    assert [span.status.status_code.name for span in legs] == ["ERROR", "ERROR", "UNSET"]


async def test_a_request_that_is_refused_ends_its_trace(pair: Stand) -> None:
    traced = Traced(pair)
    async with traced.coordinator.running() as door:
        pair.coordinator = door
        assert (await pair.post("/v1/completions", {"prompt": "a", "model": "unknown"}))[0] == 404
        await until(lambda: "request" in traced.spans())
    assert list(traced.spans()) == ["request"]
    assert dict(traced.spans()["request"].attributes or {})["hexgen2.status"] == "404"


async def test_off_means_nothing_at_all(pair: Stand) -> None:
    await pair.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, traceparent=CLIENT)
    assert header(pair, "d0") == CLIENT, "passed through as it came"
    with Tracing().request({}, "/", "x") as trace:
        assert trace is NO_TRACE
        assert trace.part("queue") is NO_TRACE


class Collector(http.server.ThreadingHTTPServer):
    """Keeps what is posted to it: (path, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Posts)
        self.received: list[tuple[str, bytes]] = []


class Posts(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
async def test_traces_reach_a_collector_over_otlp(pair: Stand, path: str) -> None:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tracing = Tracing.to_endpoint(f"http://127.0.0.1:{server.server_port}{path}")
        async with Coordinator(pair.coordinator.config, tracing=tracing).running() as door:
            pair.coordinator = door
            await pair.complete("a", max_tokens=1)
        # Leaving the block has sent what was left.
        assert {path for path, _ in server.received} == {"/v1/traces"}
        bodies = b"".join(body for _, body in server.received)  # one, unless some seconds went by meanwhile
        assert all(name in bodies for name in (b"hexgen2.leg_1", b"hexgen2.kv_handoff"))
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://"])
def test_an_endpoint_that_is_none_is_told(endpoint: str) -> None:
    with pytest.raises(InputError, match="no http:// or https:// address"):
        Tracing.to_endpoint(endpoint)
