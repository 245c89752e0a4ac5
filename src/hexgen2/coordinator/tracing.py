"""OpenTelemetry traces of requests across their legs; nothing at all where tracing is off.

A request is one span (`hexgen2.request`, a child of the client's, by W3C `traceparent`), with children for its
wait in the queue, its first leg, the hand-off of its KV cache and its second leg. Each leg's span goes on to
its engine as `traceparent`, so that vLLM's own spans (its `--otlp-traces-endpoint`) hang below it. Retries and
migrations are events of the request's span. No prompt and no answer is ever recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from hexgen2.specs.errors import InputError
from hexgen2.specs.urls import is_http

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_TRACEPARENT, _TRACESTATE = "traceparent", "tracestate"


class Trace(Protocol):
    """One request's trace."""

    def part(self, name: str, **attributes: str | int | float | bool) -> Part:
        """A part of the request's way that begins now. Whoever begins it ends it."""
        ...

    def event(self, name: str, **attributes: str | int | float | bool) -> None:
        """Something that happened to the request."""
        ...

    def note(self, **attributes: str | int | float | bool) -> None:
        """What became known of the request."""
        ...


class Part(Protocol):
    """A part of a request's way; used as `with`, or ended by hand. An exception that leaves it is its error."""

    def __enter__(self) -> Part: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

    def headers(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """The headers of a request to an engine that is this part's work."""
        ...

    def end(self) -> None:
        """Once; later calls do nothing."""
        ...


class NoTrace(Trace, Part):
    """Where tracing is off: the trace and each part of it."""

    @override
    def part(self, name: str, **attributes: str | int | float | bool) -> NoTrace:
        return self

    def event(self, name: str, **attributes: str | int | float | bool) -> None: ...

    def note(self, **attributes: str | int | float | bool) -> None: ...

    def __enter__(self) -> NoTrace:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

    def headers(self, given: Mapping[str, str]) -> Mapping[str, str]:
        return given

    def end(self) -> None: ...


NO_TRACE = NoTrace()


class Tracing:
    """Makes the traces. `Tracing(None)` is off."""

    def __init__(self, tracer: Tracer | None = None, provider: Any = None, endpoint: str | None = None) -> None:
        self._tracer = tracer
        self._provider = provider
        self.endpoint = endpoint

    @classmethod
    def to_endpoint(cls, endpoint: str | None) -> Tracing:
        """Traces sent in batches by OTLP over HTTP, to a collector's base address or its `/v1/traces`; off
        without one. InputError where OpenTelemetry is not installed."""
        if endpoint is None:
            return cls()
        if not is_http(endpoint):
            problem = f"{endpoint!r} is no http:// or https:// address"
            raise InputError("--otlp-traces-endpoint", "", problem, "give the collector's base address")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            problem = "OpenTelemetry is not installed"
            raise InputError(
                "--otlp-traces-endpoint", "", problem, "pip install 'hexgen2[otel]', or leave the option out"
            ) from None
        path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
        provider = TracerProvider(resource=Resource.create({"service.name": "hexgen2-coordinator"}))
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + path)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider.get_tracer("hexgen2.coordinator"), provider, endpoint)

    @contextmanager
    def request(self, headers: Mapping[str, str], endpoint: str, id_: str) -> Iterator[Trace]:
        """The trace of a request inside the block."""
        if self._tracer is None:
            yield NO_TRACE
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in (_TRACEPARENT, _TRACESTATE) if name in headers}
        span = self._tracer.start_span(
            "hexgen2.request",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"url.path": endpoint, "gen_ai.request.id": id_},
        )
        part = _SpanPart(span)
        with part:
            yield _SpanTrace(self._tracer, span)

    def close(self) -> None:
        """Send what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


class _SpanTrace:
    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)

    def part(self, name: str, **attributes: str | int | float | bool) -> _SpanPart:
        from opentelemetry.trace import SpanKind

        kind = SpanKind.CLIENT if "hexgen2.group" in attributes else SpanKind.INTERNAL
        span = self._tracer.start_span(
            f"hexgen2.{name}", context=self._context, kind=kind, attributes=attributes
        )
        return _SpanPart(span)

    def event(self, name: str, **attributes: str | int | float | bool) -> None:
        self._span.add_event(name, attributes)

    def note(self, **attributes: str | int | float | bool) -> None:
        self._span.set_attributes(attributes)


class _SpanPart:
    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> _SpanPart:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._span.is_recording():
            from opentelemetry.trace import StatusCode

            # The message of an error may quote an engine's answer; its type tells enough here.
            self._span.set_status(StatusCode.ERROR, type(error).__name__)
        self.end()

    def headers(self, given: Mapping[str, str]) -> Mapping[str, str]:
        context = self._span.get_span_context()
        value = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        kept = {name: text for name, text in given.items() if name.lower() != _TRACEPARENT}
        return kept | {_TRACEPARENT: value}

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()
