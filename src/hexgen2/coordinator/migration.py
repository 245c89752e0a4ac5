"""Taking up a broken stream on another path."""

from __future__ import annotations

import dataclasses
import json

from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.continuation import Splice, continuation_body, stop_strings, tokens_left
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.exchange import Exchange
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
        text = await _generated_text(exchange, client, target, within_s)
        if not text.startswith(journal.text):
            raise CannotContinue("text_differs")
        keep = bool(request.body.get("include_stop_str_in_output"))
        seam = StopSeam(text, len(journal.text), stops, keep)
    body = continuation_body(request.body, request.chat, journal, left)
    exchange.sent = dataclasses.replace(
        request, endpoint="/v1/completions", body=body, raw=encode(body), stream=True, obstacle=None
    )
    exchange.splice = Splice(request.body, request.chat, journal, seam)


async def _generated_text(exchange: Exchange, client: EngineClient, target: str, within_s: float) -> str:
    """The text of all tokens generated so far, what the lost engine held back included."""
    journal = exchange.journal
    before = (journal.prompt_ids or [])[-_CONTEXT_TOKENS:]
    whole = await _detokenize(exchange, client, target, [*before, *journal.token_ids], within_s)
    prefix = await _detokenize(exchange, client, target, before, within_s)
    if not whole.startswith(prefix):
        raise CannotContinue("text_differs")
    # A character whose bytes are not all there shows as U+FFFD; the next engine gives it whole.
    return whole[len(prefix) :].rstrip("\ufffd")


async def _detokenize(
    exchange: Exchange, client: EngineClient, target: str, ids: list[int], within_s: float
) -> str:
    body = {"tokens": ids}
    if exchange.request.body.get("model") is not None:
        body["model"] = exchange.request.body["model"]
    async with client.call(target) as call:
        await call.open("/detokenize", encode(body), exchange.request.headers, within_s)
        content = await call.read(within_s)
        if call.status != 200:
            raise EngineFailure("bad_answer", target, f"/detokenize answered HTTP {call.status}")
    return str(json.loads(content)["prompt"])
