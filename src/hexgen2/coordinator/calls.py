"""One HTTP request to an engine: every wait is bounded, and it ends at once when the engine is declared
down.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure, FailureKind
from hexgen2.coordinator.stream import DONE, EventBlocks, failure_in
from hexgen2.coordinator.upstream import Connection, Pool, lacks_means

if TYPE_CHECKING:
    from hexgen2.coordinator.client import EngineClient

# Of a stream, what may lie here until somebody takes it; then the engine has to wait.
_AHEAD_BYTES = 2**18


class EngineCall:
    """`async with client.call(group) as call:` then `open`, then `read`, or `next_block` and `pour`.

    Whatever goes wrong with the engine leaves the block as an `EngineFailure`. Leaving the block before the
    answer is whole closes the connection, which makes the engine stop generating.
    """

    def __init__(self, client: EngineClient, engine: Engine, source: Engine | None = None) -> None:
        self.engine = engine
        self.deadline: float | None = None
        self.allowed_s = 0.0
        self.status = 0
        self.content_type = ""
        self.done = False  # the stream's `[DONE]` has come
        self._now = asyncio.get_running_loop().time
        self._client = client
        self._source = source
        self._connection: Connection | None = None
        self._connecting: asyncio.Timeout | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._data: list[bytes] = []  # of the body, as long as nobody has taken it
        self._ahead = 0
        self._streams = self._paused = False
        self._whole: bool | None = None  # once the answer has ended
        self._cutter = EventBlocks()
        self._sink: Callable[[bytes], bool] | None = None

    async def __aenter__(self) -> Self:
        self._client.desk.leg(self.engine, 1)
        self.engine.calls.add(self)
        if self._source is not None:
            self._source.feeding.add(self)
        self._client.watched.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.desk.leg(self.engine, -1)
        self.engine.calls.discard(self)
        self._client.watched.discard(self)
        self._has_its_kv()
        if self._connection is not None:
            self._connection.release(self.done and self._failure is None)
            self._connection = None

    def expire(self, kind: FailureKind, group_id: str, detail: str) -> None:
        """End the call from outside, as a failure of that engine; one that has all its answer cannot fail."""
        if self._failure is None and not self.done and self._whole is None:
            self._fail(EngineFailure(kind, group_id, detail))
            # One that has run out in this very turn of the event loop can be moved no more, and need not be.
            if self._connecting is not None and not self._connecting.expired():
                self._connecting.reschedule(self._now())

    # What the connection tells

    def headed(self, status: int, content_type: str) -> None:
        self._heard()
        self.status, self.content_type = status, content_type
        self._wake()

    def received(self, data: bytes) -> None:
        now = self._now()
        self.engine.heard_at = now
        if self.deadline is not None:
            self.deadline = now + self.allowed_s
        if self._sink is not None:
            self._pass_on(data)
            return
        self._data.append(data)
        self._ahead += len(data)
        if self._streams and self._ahead > _AHEAD_BYTES:
            self._pause()
        self._wake()

    def ended(self, whole: bool) -> None:
        self._whole = whole
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._wake()

    async def _more(self, within_s: float) -> None:
        """Wait until something is told; the failure where there is one."""
        self.allowed_s, self.deadline = within_s, self._now() + within_s
        try:
            if self._failure is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            self._waiter = self.deadline = None
        if self._failure is not None:
            raise self._failure

    def _heard(self) -> None:
        self.engine.heard_at = self._now()

    def _has_its_kv(self) -> None:
        if self._source is not None:
            self._source.feeding.discard(self)
            self._source = None

    def _pause(self) -> None:
        if self._connection is not None and not self._paused:
            self._paused = True
            self._connection.pause()

    def _resume(self) -> None:
        if self._connection is not None and self._paused:
            self._paused = False
            self._connection.resume()

    # What the caller asks

    async def open(self, path: str, body: bytes, headers: Mapping[str, str], within_s: float) -> None:
        """Send the request and wait for the answer's head; EngineFailure for an answer of 5xx."""
        pool = self._client.pool(self.engine)
        self._connection = pool.take() or await self._connect(pool)
        try:
            self._connection.send(self, pool.prefix + path, headers, body)
        except ValueError as error:
            raise EngineFailure("bad_answer", self.engine.id, str(error)) from error
        while not self.status:
            if self._whole is not None:
                raise self._lost()
            await self._more(within_s)
        self._streams = self.status == 200 and self.content_type.startswith("text/event-stream")
        if self.status >= 500:
            detail = f"it answered HTTP {self.status}"
            if message := error_message(await self.read(within_s)):
                detail += f" ({message})"
            raise EngineFailure("http_5xx", self.engine.id, detail)

    async def _connect(self, pool: Pool) -> Connection:
        limit_s = self._client.timeouts.connect_s
        if self._failure is not None:
            raise self._failure
        try:
            try:
                async with asyncio.timeout(limit_s) as self._connecting:
                    return await pool.connect()
            finally:
                self._connecting = None
        except TimeoutError as error:
            if self._failure is not None:
                raise self._failure from None
            # A late connection is no proof of death: /health decides.
            raise EngineFailure("connect", self.engine.id, f"no connection within {limit_s:g} s") from error
        except OSError as error:
            if lacks_means(error):
                raise EngineFailure("connect", self.engine.id, f"no connection: {error.strerror}") from error
            detail = "it refuses connections"
            if isinstance(error, ssl.SSLError):
                detail = f"no TLS connection ({error.reason or error})"
            self._client.desk.mark_down(self.engine, detail)
            raise EngineFailure("connect", self.engine.id, detail) from error

    def _lost(self) -> EngineFailure:
        return EngineFailure("lost", self.engine.id, "the connection broke before the answer was whole")

    async def read(self, within_s: float) -> bytes:
        """The whole answer."""
        self._resume()
        deadline = self._now() + within_s
        while self._whole is None:
            await self._more(max(0.0, deadline - self._now()))
        if not self._whole:
            raise self._lost()
        return b"".join(self._data)

    async def next_block(self, within_s: float) -> bytes | None:
        """The next whole events of a stream; None after `[DONE]`. EngineFailure where the stream fails.

        The events before a failure come first, and the failure with the next call.
        """
        while not self.done:
            if self._failure is not None:
                raise self._failure
            if self._data:
                data, self._data, self._ahead = b"".join(self._data), [], 0
                self._resume()
                block = self._checked(self._cutter.feed(data))
                if block:
                    return block
            elif self._whole is not None:
                raise self._cut_short()
            else:
                await self._more(within_s)
        return None

    async def pour(self, sink: Callable[[bytes], bool], within_s: float) -> bool:
        """Give `sink` every further block as it comes, until the stream is done; or until the sink answers that
        it is full (False): what comes then waits here, until this is called again. Whether the stream is done.
        """
        while not self.done:
            if self._data:  # it came while nobody took it
                block = await self.next_block(within_s)
                if block is not None and not sink(block):
                    return self.done
                continue
            if self._failure is not None:
                raise self._failure
            if self._whole is not None:
                raise self._cut_short()
            self._resume()
            self._sink = sink
            try:
                await self._more(within_s)
            finally:
                full, self._sink = self._sink is None, None
            if full:
                return self.done
        return True

    def _pass_on(self, data: bytes) -> None:
        assert self._sink is not None
        block = self._checked(self._cutter.feed(data))
        try:
            if block and not self._sink(block):
                self._sink = None
                self._pause()
                self._wake()
        except Exception as error:
            self._fail(error)
        if self.done or self._failure is not None:
            self._wake()

    def _checked(self, block: bytes) -> bytes:
        """A block without what comes after a failure, which is noted; likewise the stream's end."""
        if not block:
            return block
        if self._source is not None:
            self._has_its_kv()
        failed = failure_in(block)
        if failed is not None:
            block, kind, message = failed
            self._failure = self._failure or EngineFailure(kind, self.engine.id, message)
        else:
            self.done = block.endswith(DONE)
        return block

    def _cut_short(self) -> EngineFailure:
        return EngineFailure("lost", self.engine.id, "the stream ended before it was done")


def error_message(content: bytes) -> str:
    """The message of an OpenAI error body, shortened; empty where it is not one."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        return ""
    return str(message)[:200]
