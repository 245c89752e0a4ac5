"""One HTTP request to an engine: every wait is bounded, and it ends at once when the engine is declared
down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import aiohttp

from hexgen2.coordinator.config import Timeouts
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure, FailureKind
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.stream import DONE, EventBlocks, failure_in

# Shorter than the 5 s after which uvicorn closes an idle connection: a request must not meet a closing one.
_KEEPALIVE_S = 3.0

# How long the end of a body may take after `[DONE]` before the connection is closed instead of kept.
_TAIL_S = 0.2

# A process that did nothing for so long, beyond the watch's own pause, was not given the time.
_STALL_S = 1.0


class EngineClient:
    """Connections to the engines, and the watch over the calls that use them.

    Deadlines are not timers: each call notes until when it may wait, and one task looks at all of them
    several times a second. A stream of tokens then costs one assignment per token, not a timer.
    """

    def __init__(self, fleet: Fleet, timeouts: Timeouts) -> None:
        self.fleet = fleet
        self.timeouts = timeouts
        self._session: aiohttp.ClientSession | None = None
        self._probes: aiohttp.ClientSession | None = None
        self.watched: set[EngineCall] = set()
        self._ticked_at = self._stalled_at = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect_s)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        # Health polls set up a connection each: they then also tell whether the engine still accepts any,
        # and do not keep the pool's idle connections alive.
        self._probes = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))
        self._watch = asyncio.create_task(self._watch_calls(), name="engine-call-watch")

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for session in (self._session, self._probes):
            if session is not None:
                await session.close()
        self._watch = self._session = self._probes = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests: connections are kept and used again."""
        assert self._session is not None, "the client is not started"
        return self._session

    @property
    def probes(self) -> aiohttp.ClientSession:
        """For questions about the engine: a connection each."""
        assert self._probes is not None, "the client is not started"
        return self._probes

    def surely_at(self, earliest: float, seen: float) -> float:
        """When something happened, at the earliest, that was looked for from `earliest` on and seen at `seen`
        (event-loop times): then, unless this process stood still in between."""
        stalled = self._stalled_at > earliest or seen - self._ticked_at > _STALL_S
        return earliest if stalled else seen

    def call(self, group_id: str, kv_from: str | None = None) -> EngineCall:
        """A request to an engine, which may have to fetch the prompt's KV cache from `kv_from`."""
        source = self.fleet.engines[kv_from] if kv_from is not None else None
        return EngineCall(self, self.fleet.engines[group_id], source)

    async def _watch_calls(self) -> None:
        loop = asyncio.get_running_loop()
        bounds = (self.timeouts.prefill_s, self.timeouts.first_byte_s, self.timeouts.idle_s)
        pause = min(0.25, min(bounds) / 4)
        self._ticked_at = loop.time()
        while True:
            await asyncio.sleep(pause)
            now = loop.time()
            if now - self._ticked_at > _STALL_S:
                self._stalled_at = now
            self._ticked_at = now
            for call in list(self.watched):
                if call.deadline is not None and call.deadline < now:
                    call.expire("timeout", call.engine.id, f"nothing came for {call.allowed_s:g} s")


class EngineCall:
    """`async with client.call(group) as call:` then `open`, then `read` or `next_block`.

    Whatever goes wrong with the engine leaves the block as an `EngineFailure`. Leaving the block before the
    answer is whole closes the connection, which makes the engine stop generating.
    """

    def __init__(self, client: EngineClient, engine: Engine, source: Engine | None = None) -> None:
        self.engine = engine
        self.deadline: float | None = None
        self.allowed_s = 0.0
        self.status = 0
        self.content_type = ""
        self._now = asyncio.get_running_loop().time
        self._client = client
        self._source = source
        self._response: aiohttp.ClientResponse | None = None
        self._scope = asyncio.timeout(None)
        self._expired: tuple[FailureKind, str, str] | None = None
        self._cutter = EventBlocks()
        self._pending_failure: EngineFailure | None = None
        self.done = False

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self.engine.in_flight += 1
        self.engine.calls.add(self)
        if self._source is not None:
            self._source.feeding.add(self)
        self._client.watched.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.in_flight -= 1
        self.engine.calls.discard(self)
        self._client.watched.discard(self)
        self._has_its_kv()
        if self._response is not None:
            # An answer read to its end gives the connection back; any other is cut off, which aborts the
            # generation.
            self._response.release() if self._response.content.at_eof() else self._response.close()
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError as timeout:
            if self._expired is None:
                raise
            raise EngineFailure(*self._expired) from timeout
        if isinstance(
            error, aiohttp.ServerTimeoutError
        ):  # a late connection is no proof of death: /health decides
            detail = f"no connection within {self._client.timeouts.connect_s:g} s"
            raise EngineFailure("connect", self.engine.id, detail) from error
        if isinstance(error, aiohttp.ClientConnectorError):
            detail = "it refuses connections"
            self._client.fleet.mark_down(self.engine, detail)
            raise EngineFailure("connect", self.engine.id, detail) from error
        if isinstance(error, aiohttp.ClientError):
            detail = "the connection broke before the answer was whole"
            raise EngineFailure("lost", self.engine.id, detail) from error

    def expire(self, kind: FailureKind, group_id: str, detail: str) -> None:
        """End the call from outside, as a failure of that engine; one that has all its answer cannot fail."""
        if self._expired is None and not self.done:
            self._expired = (kind, group_id, detail)
            self._scope.reschedule(self._now())

    def _has_its_kv(self) -> None:
        if self._source is not None:
            self._source.feeding.discard(self)
            self._source = None

    def _wait_up_to(self, seconds: float) -> None:
        self.allowed_s = seconds
        self.deadline = self._now() + seconds

    def _heard(self) -> None:
        self.deadline = None
        self.engine.heard_at = self._now()

    async def open(self, path: str, body: bytes, headers: Mapping[str, str], within_s: float) -> None:
        """Send the request and wait for the answer's head; EngineFailure for an answer of 5xx."""
        self._wait_up_to(within_s)
        url = self.engine.endpoint.url + path
        self._response = await self._client.session.post(url, data=body, headers=headers)
        self._heard()
        self.status = self._response.status
        self.content_type = self._response.headers.get("Content-Type", "application/json")
        if self.status >= 500:
            detail = f"it answered HTTP {self.status}"
            if message := error_message(await self.read(within_s)):
                detail += f" ({message})"
            raise EngineFailure("http_5xx", self.engine.id, detail)

    async def read(self, within_s: float) -> bytes:
        """The whole answer."""
        assert self._response is not None
        self._wait_up_to(within_s)
        content = await self._response.read()
        self._heard()
        return content

    async def next_block(self, within_s: float) -> bytes | None:
        """The next whole events of a stream; None after `[DONE]`. EngineFailure where the stream fails.

        The events before a failure come first, and the failure with the next call.
        """
        assert self._response is not None
        if self._pending_failure is not None:
            raise self._pending_failure
        if self.done:
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(_TAIL_S):
                    await self._response.read()  # the end of the body: then the connection can serve again
            return None
        while True:
            self._wait_up_to(within_s)
            data = await self._response.content.readany()
            self._heard()
            if not data:
                raise EngineFailure("lost", self.engine.id, "the stream ended before it was done")
            block = self._cutter.feed(data)
            if not block:
                continue
            if self._source is not None:
                self._has_its_kv()
            failed = failure_in(block)
            if failed is not None:
                before, kind, message = failed
                failure = EngineFailure(kind, self.engine.id, message)
                if not before:
                    raise failure
                self._pending_failure = failure
                return before
            self.done = block.endswith(DONE)
            return block


def error_message(content: bytes) -> str:
    """The message of an OpenAI error body, shortened; empty where it is not one."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        return ""
    return str(message)[:200]
