"""The emulated engine's HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import aiohttp
from aiohttp import web

from hexgen2.emulator import kv as kv_cache
from hexgen2.emulator import protocol, tokens
from hexgen2.emulator.engine import EngineCore, Sequence
from hexgen2.emulator.faults import Fault
from hexgen2.emulator.memory import KvMemory
from hexgen2.emulator.protocol import Generation, Refused
from hexgen2.emulator.timing import LinearTiming, TimedTransfers, Timing, Transfers

LOG_LENGTH = 4096


@dataclass(frozen=True)
class EmulatorConfig:
    """What an emulated engine pretends to be. `role` only shows in its id: like vLLM, it does what a
    request asks. `name`: what others call it when they fetch from it (`Transfers`), its role by default.
    `token_budget`: tokens of one iteration at most. `kv_tokens`: the size of its KV cache.
    """

    model_names: tuple[str, ...] = ("emulated",)
    role: str = "colocated"
    timing: Timing = field(default_factory=LinearTiming)
    max_batch: int = 256
    max_model_len: int = 131_072
    kv_bytes_per_token: int = 4096
    kv_tokens: int = 1 << 20
    lease_s: float = 30.0
    name: str | None = None
    token_budget: float = inf
    block_size: int = 16
    transfers: Transfers | None = None  # what `timing` says, where there are none


@dataclass(frozen=True)
class Received:
    """A request as it arrived, for tests that look at what a proxy sends."""

    path: str
    headers: Mapping[str, str]
    body: Any
    at: float


class _EndStream(Exception):
    """A fault closed the connection."""


class EmulatedEngine:
    """One engine. `async with EmulatedEngine(config).running(port) as engine:` or `start` / `stop`."""

    def __init__(self, config: EmulatorConfig | None = None, fault: Fault | None = None) -> None:
        self.config = config or EmulatorConfig()
        self.fault = fault
        given = self.config
        memory = KvMemory(given.kv_tokens, given.block_size)
        self.core = EngineCore(given.timing, given.max_batch, given.token_budget, memory)
        self.engine_id = f"{given.name or given.role}-{uuid.uuid4().hex[:8]}"
        self.kv_store = kv_cache.KvStore(self.engine_id, given.lease_s, given.block_size)
        self.core.reclaim = self.kv_store.expire
        self.received: deque[Received] = deque(maxlen=LOG_LENGTH)
        self.kv_bytes = 0
        self.kv_pulls = 0
        self.kv_seconds = 0.0
        self.kv_failed = 0
        self.healthy = True
        self.host = "127.0.0.1"
        self.port = 0
        self.on_die: Callable[[], None] = self.kill
        self._transfers = given.transfers or TimedTransfers(given.timing)
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def _longest(self) -> int:
        return min(self.config.max_model_len, self.config.kv_tokens)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[EmulatedEngine]:
        await self.start(port, host)
        try:
            yield self
        finally:
            await self.stop()

    async def start(self, port: int = 0, host: str = "127.0.0.1") -> None:
        app = web.Application(client_max_size=256 * 2**20)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post(kv_cache.PULL_PATH + "{engine}/{key}", self._pull)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=30, sock_connect=2),
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        await site.start()
        self.host = host
        self.port = self._runner.addresses[0][1]
        self.core.start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()
        await self.core.stop()
        self._runner = self._session = None

    def kill(self) -> None:
        """Die as a killed process does: the port closes and every connection is reset, nothing is said."""
        self.healthy = False
        self.core.freeze()
        if self._runner is None or self._runner.server is None:
            return
        for site in list(self._runner.sites):
            server = getattr(site, "_server", None)
            if server is not None:
                server.close()
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def freeze(self) -> None:
        """Stop answering, as a stopped process does: connections stay open and silent."""
        self.core.freeze()

    def thaw(self) -> None:
        self.core.thaw()

    # Plain endpoints

    async def _health(self, _: web.Request) -> web.Response:
        await self.core.thawed.wait()
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, _: web.Request) -> web.Response:
        cards = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "vllm",
                "root": name,
                "parent": None,
                "max_model_len": self.config.max_model_len,
            }
            for name in self.config.model_names
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _tokenize(self, request: web.Request) -> web.Response:
        try:
            body = await _json(request)
            if isinstance(body, dict):
                body = {key: body[key] for key in ("model", "prompt", "messages") if key in body}
                body["max_tokens"] = 1
            chat = isinstance(body, dict) and "messages" in body
            generation = protocol.parse(body, chat, self.config.model_names, 1 << 40)
        except Refused as error:
            return web.json_response(error.body, status=error.status)
        ids = list(generation.prompts[0])
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": self.config.max_model_len})

    async def _detokenize(self, request: web.Request) -> web.Response:
        try:
            ids = protocol.token_ids(await _json(request))
        except Refused as error:
            return web.json_response(error.body, status=error.status)
        return web.json_response({"prompt": tokens.decode(ids)})

    async def _pull(self, request: web.Request) -> web.Response:
        await self.core.thawed.wait()
        if request.match_info["engine"] != self.engine_id:
            return web.json_response({}, status=409)
        held = self.kv_store.pull(request.match_info["key"])
        if held is None:
            return web.json_response({}, status=410)
        return web.json_response({"fingerprint": held.fingerprint, "tokens": held.tokens})

    async def _metrics(self, _: web.Request) -> web.Response:
        await self.core.thawed.wait()
        label = f'{{engine="0",model_name="{self.config.model_names[0]}"}}'
        core = self.core
        values: dict[str, float] = {
            "vllm:num_requests_running": len(core.running),
            "vllm:num_requests_waiting": len(core.waiting),
            "vllm:kv_cache_usage_perc": core.memory.used / core.memory.total,
            "vllm:prompt_tokens_total": core.prompt_tokens_total,
            "vllm:generation_tokens_total": core.generation_tokens_total,
            "vllm:nixl_bytes_transferred_sum": self.kv_bytes,
            "vllm:nixl_bytes_transferred_count": self.kv_pulls,
            "vllm:nixl_xfer_time_seconds_sum": self.kv_seconds,
            "vllm:nixl_xfer_time_seconds_count": self.kv_pulls,
            "vllm:nixl_num_failed_transfers_total": self.kv_failed,
            "vllm:nixl_num_kv_expired_reqs_total": self.kv_store.expired_total,
        }
        text = "".join(f"{name}{label} {float(value)}\n" for name, value in values.items())
        return web.Response(text=text, content_type="text/plain")

    # Generation

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, chat=True)

    async def _serve(self, request: web.Request, chat: bool) -> web.StreamResponse:
        await self.core.thawed.wait()
        try:
            body = await _json(request)
        except Refused as error:
            return web.json_response(error.body, status=error.status)
        self.received.append(Received(request.path, request.headers, body, time.monotonic()))
        fault = self.fault if self.fault is not None and self.fault.take() else None
        if fault is not None and fault.kind in ("http_500", "http_503"):
            status = int(fault.kind[5:])
            refused = protocol.error_body(status, "fault on demand", "InternalServerError")
            return web.json_response(refused, status=status)
        try:
            generation = protocol.parse(body, chat, self.config.model_names, self._longest)
            sequences = await self._sequences(generation)
        except Refused as error:
            return web.json_response(error.body, status=error.status)
        given = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        run = _Run(self, generation, f"{'chatcmpl' if chat else 'cmpl'}-{given}", sequences, fault)
        for sequence in sequences:
            self.core.submit(sequence)
        try:
            return await (run.stream(request) if generation.stream else run.answer())
        except _EndStream:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        finally:
            for sequence in sequences:
                self.core.abort(sequence)
                self.core.memory.give(
                    sequence.blocks
                )  # it ended, and nobody was told where to fetch its KV cache
                sequence.blocks = 0

    async def _sequences(self, g: Generation) -> list[Sequence]:
        """The generations of a request, index order as in its answer; KV caches are pulled here."""
        sequences = []
        for prompt in g.prompts:
            for copy in range(g.n):
                received = await self._receive(g, list(prompt))
                # Copies differ as samples do: the copy's number is folded into the model's state, not the
                # prompt.
                seed = [*prompt, -10 - copy] if copy else list(prompt)
                sequence = Sequence(seed, max(1, g.max_tokens), keeps_blocks=bool(_fetched_later(g)))
                if received is not None:
                    sequence = Sequence(
                        seed,
                        max(1, g.max_tokens),
                        kv_ready=True,
                        garbage=not received.right,
                        blocks=received.blocks,
                    )
                sequences.append(sequence)
        return sequences

    async def _receive(self, g: Generation, prompt: list[int]) -> _Arrived | None:
        """Take memory for a KV cache and fetch it; None where the prompt is computed here.

        As with NIXL the producer learns at the end of a transfer that it may free its blocks.
        """
        if not (g.kv and g.kv.get("do_remote_prefill") and g.kv.get("remote_request_id")):
            return None
        assert self._session is not None
        blocks = self.core.memory.blocks(len(prompt))
        await self.core.memory.take(blocks)
        began = time.monotonic()
        try:
            source = str(g.kv.get("remote_engine_id")).rpartition("-")[0]
            await self._transfers.move(source, len(prompt))
            right = await kv_cache.fetch(self._session, g.kv, prompt)
        except kv_cache.PullFailed as error:
            self.core.memory.give(blocks)
            self.kv_failed += 1
            message = f"KV load failed: {error}"
            raise Refused(500, message, "InternalServerError") from error
        except BaseException:
            self.core.memory.give(blocks)
            raise
        self.kv_bytes += len(prompt) * self.config.kv_bytes_per_token
        self.kv_pulls += 1
        self.kv_seconds += time.monotonic() - began
        return _Arrived(blocks, right)


@dataclass(frozen=True)
class _Arrived:
    """A KV cache that was fetched: the blocks it fills, and whether it was the right one."""

    blocks: int
    right: bool


def _fetched_later(g: Generation) -> bool:
    return bool(g.kv and g.kv.get("do_remote_decode"))


async def _json(request: web.Request) -> Any:
    """The body; Refused where it is no JSON, or no text."""
    raw = await request.read()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"invalid JSON: {error}") from None
    protocol.check_text(raw)
    return body


class _Run:
    """One request while it runs: gathers its sequences' tokens into an answer or a stream."""

    def __init__(
        self,
        engine: EmulatedEngine,
        g: Generation,
        request_id: str,
        sequences: list[Sequence],
        fault: Fault | None,
    ) -> None:
        self.engine = engine
        self.g = g
        self.id = request_id
        self.sequences = sequences
        self.fault = fault
        self.created = int(time.time())
        self.model = engine.config.model_names[0]
        self.prompt_tokens = sum(map(len, g.prompts))
        self.generated = 0

    async def _tokens(self, index: int) -> AsyncIterator[tuple[str, list[int], str | None, str | None]]:
        """(text, ids, finish reason, stop reason) of each token of one sequence."""
        sequence = self.sequences[index]
        out = protocol.TextOut(self.g.stops, self.g.keep_stop)
        count = 0
        while (token := await sequence.queue.get()) is not None:
            if self.fault is not None and count == self.fault.after_tokens and self.fault.kind != "no_end":
                await self._strike(self.fault)
            count += 1
            self.generated += 1
            last = count == sequence.max_tokens
            text, stop = out.add(token, last)
            if stop is not None:
                self.engine.core.abort(sequence)
                yield text, [token], "stop", stop
                return
            yield text, [token], "length" if last else None, None

    async def _strike(self, fault: Fault) -> None:
        if fault.kind == "die":
            self.engine.on_die()
            raise _EndStream
        if fault.kind == "hang":
            self.engine.freeze()
            await self.engine.core.thawed.wait()
        elif fault.kind == "cut":
            raise _EndStream
        else:
            raise _CoreFailed(fault.kind)

    async def answer(self) -> web.Response:
        choices = []
        for index in range(len(self.sequences)):
            text, ids, finish, reason = self.g.echo, [], "length", None
            try:
                async for more, new, end, stop in self._tokens(index):
                    text += more
                    ids += new
                    finish, reason = end or finish, stop
            except _CoreFailed as failed:
                if failed.kind != "finish_error":
                    refused = protocol.error_body(
                        500, "EngineCore encountered an issue.", "InternalServerError"
                    )
                    return web.json_response(refused, status=500)
                finish = "error"
            choices.append(protocol.answer_choice(self.g, index, text, ids, finish, reason))
        used = protocol.usage(self.prompt_tokens, self.generated)
        body = protocol.answer(self.id, self.created, self.model, self.g, choices, used, self._offer())
        return web.Response(
            body=json.dumps(body, separators=(",", ":")).encode(), content_type="application/json"
        )

    def _offer(self) -> protocol.Body | None:
        if not _fetched_later(self.g):
            return None
        engine, sequence = self.engine, self.sequences[0]
        memory, blocks = engine.core.memory, sequence.blocks
        sequence.blocks = 0  # from now on they are the store's
        prompt = list(self.g.prompts[0])
        return engine.kv_store.offer(self.id, prompt, engine.host, engine.port, lambda: memory.give(blocks))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        merged: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        feeders = [asyncio.create_task(self._feed(index, merged)) for index in range(len(self.sequences))]
        try:
            open_feeds = len(feeders)
            while open_feeds:
                item = await merged.get()
                if item is None:
                    open_feeds -= 1
                elif isinstance(item, _CoreFailed):
                    await self._failed(response, item)
                    return response
                elif isinstance(item, BaseException):
                    if self.fault is not None and self.fault.kind == "cut":
                        await response.write(b'data: {"id":"cut in the mid')
                    raise item
                else:
                    await response.write(item)
            if self.g.include_usage:
                body = protocol.chunk(
                    self.id, self.created, self.model, self.g, 0, "", [], None, None, False, 0
                )
                body |= {"choices": [], "usage": protocol.usage(self.prompt_tokens, self.generated)}
                await response.write(protocol.event(body))
            await response.write(b"data: [DONE]\n\n")
            if self.fault is not None and self.fault.kind == "no_end":
                await asyncio.Event().wait()
            return response
        finally:
            for feeder in feeders:
                feeder.cancel()

    async def _failed(self, response: web.StreamResponse, failed: _CoreFailed) -> None:
        if failed.kind == "finish_error":
            body = protocol.chunk(self.id, self.created, self.model, self.g, 0, "", [], "error", None, False, 0)
        else:
            body = protocol.error_body(500, "EngineCore encountered an issue.", "InternalServerError")
        await response.write(protocol.event(body))
        await response.write(b"data: [DONE]\n\n")

    async def _feed(self, index: int, merged: asyncio.Queue[bytes | BaseException | None]) -> None:
        """One sequence's events into the common queue; an exception goes the same way."""
        try:
            offset, first = 0, True
            async for text, ids, finish, reason in self._tokens(index):
                if first and self.g.chat:
                    role = protocol.role_chunk(self.id, self.created, self.model, self.g, index)
                    merged.put_nowait(protocol.event(role))
                if first:
                    text = self.g.echo + text
                body = protocol.chunk(
                    self.id, self.created, self.model, self.g, index, text, ids, finish, reason, first, offset
                )
                merged.put_nowait(protocol.event(body))
                offset += sum(len(tokens.token_text(token)) for token in ids)
                first = False
            merged.put_nowait(None)
        except (_EndStream, _CoreFailed) as error:
            merged.put_nowait(error)


class _CoreFailed(Exception):
    """The emulated core failed in a way that the server still reports."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind
