"""Taking up a broken stream on another path."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.continuation import Splice, continuation_body, stop_strings, tokens_left
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.exchange import Exchange
from hexgen2.coordinator.generated_text import TextDiffers, generated_text
from hexgen2.coordinator.legs import Body
from hexgen2.coordinator.replay import Replay
from hexgen2.coordinator.request import encode
from hexgen2.coordinator.seam import StopSeam

# Tokens before the generated ones that are given to the detokenizer too: how a token reads may depend on
# those before.
_CONTEXT_TOKENS = 8


class CannotContinue(Exception):
    """The stream must end here; the text says why (a label in the metrics)."""


def obstacle(exchange: Exchange, max_migrations: int) -> str | None:
    """Why a stream that broke cannot go on; None where it can."""
    journal = exchange.journal
    if journal.record is None:
        if journal.obstacle is not None:
            return journal.obstacle
        if journal.prompt_ids is None:
            return "no_prompt_ids"
    if exchange.migrations >= max_migrations:
        return "too_many_migrations"
    return None


async def prepare(exchange: Exchange, client: EngineClient, target: str, within_s: float) -> None:
    """Set the exchange up to go on with `target` as its last engine; CannotContinue or EngineFailure
    otherwise.
    """
    request, journal = exchange.request, exchange.journal
    if journal.record is not None:
        exchange.sent = exchange.first_sent
        exchange.splice = Replay(journal.record, journal.frame)
        return
    left = tokens_left(request.body, request.chat, journal, client.engine(target).max_model_len)
    if left is None or left < 1:
        raise CannotContinue("unknown_length" if left is None else "no_tokens_left")
    seam = None
    stops = stop_strings(request.body)
    if stops:
        reader = _Reader(exchange, client, target, within_s)
        before = (journal.prompt_ids or [])[-_CONTEXT_TOKENS:]
        skips = request.body.get("skip_special_tokens") is not False
        try:
            text = await generated_text(reader, before, journal.token_ids, journal.text, skips)
        except TextDiffers:
            raise CannotContinue("text_differs") from None
        keep = bool(request.body.get("include_stop_str_in_output"))
        seam = StopSeam(text, len(journal.text), stops, keep)
    body = continuation_body(request.body, request.chat, journal, left)
    exchange.sent = dataclasses.replace(
        request, endpoint="/v1/completions", body=body, raw=encode(body), stream=True, obstacle=None
    )
    exchange.splice = Splice(request.body, request.chat, journal, seam)


class _Reader:
    """The engine that takes a stream over, asked how tokens read."""

    def __init__(self, exchange: Exchange, client: EngineClient, target: str, within_s: float) -> None:
        self._request = exchange.request
        self._client = client
        self._target = target
        self._within_s = within_s

    async def text(self, tokens: Sequence[int]) -> str:
        return str(await self._ask("/detokenize", {"tokens": tokens}, lambda answer: answer["prompt"]))

    async def streamed(self, token: int) -> str:
        body = {"prompt": [token], "allowed_token_ids": [token], "max_tokens": 1, "ignore_eos": True}
        return str(await self._ask("/v1/completions", body, lambda answer: answer["choices"][0]["text"]))

    async def _ask(self, endpoint: str, body: Body, found: Callable[[Any], Any]) -> Any:
        if self._request.body.get("model") is not None:
            body["model"] = self._request.body["model"]
        async with self._client.call(self._target) as call:
            await call.open(endpoint, encode(body), self._request.headers, self._within_s)
            content = await call.read(self._within_s)
            if call.status != 200:
                raise EngineFailure("bad_answer", self._target, f"{endpoint} answered HTTP {call.status}")
        try:
            return found(json.loads(content))
        except (ValueError, LookupError, TypeError):
            raise EngineFailure("bad_answer", self._target, f"{endpoint} answered what it should not") from None
