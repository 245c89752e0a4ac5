"""One request of an emulated engine while it runs: its sequences' tokens as an answer or a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from aiohttp import web

from hexgen2.emulator import protocol, tokens
from hexgen2.emulator.engine import Sequence
from hexgen2.emulator.faults import Fault
from hexgen2.emulator.protocol import Generation

if TYPE_CHECKING:
    from hexgen2.emulator.server import EmulatedEngine


class EndStream(Exception):
    """A fault closed the connection."""


class _CoreFailed(Exception):
    """The emulated core failed in a way that the server still reports."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class Run:
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
        out = protocol.TextOut(self.g.stops, self.g.keep_stop, self.g.skips_special)
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
            raise EndStream
        if fault.kind == "hang":
            self.engine.freeze()
            await self.engine.core.thawed.wait()
        elif fault.kind == "cut":
            raise EndStream
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
        if not self.g.fetched_later:
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
        except (EndStream, _CoreFailed) as error:
            merged.put_nowait(error)
