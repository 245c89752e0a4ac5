"""Requests of many kinds by a seed, and a client that reads each answer to its end and judges it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ONE_REQUEST_S = 300.0
"""No request of these tests may take longer: it counts as hanging."""


@dataclass(frozen=True)
class Request:
    number: int
    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """What a client got, in the same form from a stream and from a plain answer."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # finish_reason, stop_reason
    logprob_tokens: list[str] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    usage: dict[str, int] | None = None


class Wrong(Exception):
    """The answer is not a whole one."""


def requests(seed: int, count: int, model: str, stops: Sequence[str], several: bool = False) -> list[Request]:
    """A mix of streams and plain answers, of chat and completions, with what clients ask for besides.

    `several`: some ask for two answers at once (vLLM refuses that of greedy requests, emulated engines do not).
    """
    draw = random.Random(seed)
    return [_request(draw, number, model, stops, several) for number in range(count)]


def _request(draw: random.Random, number: int, model: str, stops: Sequence[str], several: bool) -> Request:
    text = " ".join(f"w{draw.randrange(5000)}" for _ in range(draw.randint(1, 60)))
    tokens = draw.randint(1, 80)
    body: dict[str, Any] = {"model": model, "temperature": 0, "ignore_eos": True}
    stream = draw.random() < 0.6
    if stream:
        body["stream"] = True
        if draw.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    if draw.random() < 0.2:
        body["stop"] = [draw.choice(stops)]
    if draw.random() < 0.2:
        body["return_token_ids"] = True
    # What cannot go on elsewhere from token ids, and is generated anew instead.
    if draw.random() < 0.1:
        body["presence_penalty"] = 0.5
    if several and draw.random() < 0.1:
        body["n"] = 2
    if draw.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}]
        body["max_completion_tokens"] = tokens
        if draw.random() < 0.1:
            body["logprobs"] = True
        return Request(number, CHAT, body)
    body["prompt"] = text
    body["max_tokens"] = tokens
    if draw.random() < 0.15:
        body["logprobs"] = 1
    elif draw.random() < 0.1 and "stop" not in body:
        body["echo"] = True
    return Request(number, COMPLETIONS, body)


async def ask(http: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    """One request, sent once. `Wrong` where the answer is an error, broken off, or not one answer."""
    id_ = f"chaos-{request.number}"
    timeout = aiohttp.ClientTimeout(total=ONE_REQUEST_S)
    try:
        async with http.post(
            url + request.path, json=request.body, headers={"X-Request-Id": id_}, timeout=timeout
        ) as response:
            content = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    if response.status != 200:
        raise Wrong(f"HTTP {response.status}: {content[:300]!r}")
    if "stream" in request.body:
        return _from_stream(content)
    answer = Answer()
    _take(answer, json.loads(content))
    return answer


def _from_stream(content: bytes) -> Answer:
    events = content.split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""] or content.count(b"data: [DONE]") != 1:
        raise Wrong(f"the stream ends with {content[-300:]!r}")
    answer, ids = Answer(), set()
    for event in events[:-2]:
        if not event.startswith(b"data: {"):
            raise Wrong(f"an event {event[:100]!r}")
        chunk = json.loads(event[6:])
        ids.add(chunk.get("id"))
        _take(answer, chunk)
    if len(ids) != 1:
        raise Wrong(f"one stream with the ids {ids}")
    return answer


def _take(answer: Answer, body: dict[str, Any]) -> None:
    if "choices" not in body:
        raise Wrong(f"no choices in {str(body)[:300]}")
    for choice in body["choices"]:
        index = choice["index"]
        if index in answer.ends:
            raise Wrong("a choice goes on after its end")
        text = choice.get("text")
        if text is None:
            text = (choice.get("message") or choice.get("delta") or {}).get("content")
        answer.texts[index] = answer.texts.get(index, "") + (text or "")
        answer.token_ids.setdefault(index, []).extend(choice.get("token_ids") or [])
        if choice.get("finish_reason") is not None:
            answer.ends[index] = (choice["finish_reason"], choice.get("stop_reason"))
        logprobs = choice.get("logprobs") or {}
        answer.logprob_tokens += logprobs.get("tokens") or []
        answer.logprob_tokens += [entry["token"] for entry in logprobs.get("content") or []]
        answer.text_offsets += logprobs.get("text_offset") or []
    answer.usage = body.get("usage") or answer.usage


async def ask_all(
    url: str, wanted: Sequence[Request], concurrency: int, gap_s: float = 0.0
) -> dict[int, Answer | Wrong]:
    """All answers by number, `concurrency` requests at a time; each of them waits `gap_s` after its answer."""
    pending = iter(wanted)
    answers: dict[int, Answer | Wrong] = {}

    async def worker(http: aiohttp.ClientSession) -> None:
        for request in pending:
            assert request.number not in answers, "each request is sent once"
            try:
                answers[request.number] = await ask(http, url, request)
            except Wrong as wrong:
                answers[request.number] = wrong
            if gap_s:
                await asyncio.sleep(gap_s)

    # A connection for each request: the client's own reuse of connections must not enter the picture.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        await asyncio.gather(*(worker(http) for _ in range(concurrency)))
    return answers
