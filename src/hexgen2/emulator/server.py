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
from hexgen2.emulator.run import EndStream, Run
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
            timeout=aiohttp.ClientTimeout(total=30, sock_connect=10),
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
        self.core.sent(held.tokens)
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
        run = Run(self, generation, f"{'chatcmpl' if chat else 'cmpl'}-{given}", sequences, fault)
        for sequence in sequences:
            self.core.submit(sequence)
        try:
            return await (run.stream(request) if generation.stream else run.answer())
        except EndStream:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        finally:
            for sequence in sequences:
                self.core.abort(sequence)
                # It ended, and nobody was told where to fetch its KV cache.
                self.core.memory.give(sequence.blocks)
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
                sequence = Sequence(
                    seed,
                    max(1, g.max_tokens),
                    kv_ready=received is not None,
                    garbage=received is not None and not received.right,
                    blocks=0 if received is None else received.blocks,
                    keeps_blocks=received is None and g.fetched_later,
                    allowed=g.allowed,
                )
                sequences.append(sequence)
        return sequences

    async def _receive(self, g: Generation, prompt: list[int]) -> _Arrived | None:
        """Take memory for a KV cache and fetch it; None where the prompt is computed here.

        As vLLM's connectors do, it asks when no iteration is under way. As with NIXL the producer learns at the
        end of a transfer that it may free its blocks.
        """
        if not (g.kv and g.kv.get("do_remote_prefill") and g.kv.get("remote_request_id")):
            return None
        assert self._session is not None
        blocks = self.core.memory.blocks(len(prompt))
        await self.core.memory.take(blocks)
        try:
            await self.core.between_iterations()
            began = time.monotonic()
            source = str(g.kv.get("remote_engine_id")).rpartition("-")[0]
            await self._transfers.move(source, len(prompt))
            right = await kv_cache.fetch(self._session, g.kv, prompt)
            await asyncio.sleep(self.config.timing.handover_wait_s(len(prompt)))
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


async def _json(request: web.Request) -> Any:
    """The body; Refused where it is no JSON, or no text."""
    raw = await request.read()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"invalid JSON: {error}") from None
    protocol.check_text(raw)
    return body
