"""Server-sent events in blocks: relayed as bytes, looked into only where something may be wrong."""

from __future__ import annotations

import json
import re
from typing import Any

from hexgen2.coordinator.errors import FailureKind

DONE = b"data: [DONE]\n\n"
_END = b"\n\n"

# Inside a JSON string a quote is always escaped, so these bytes can only be JSON's own.
_FINISH_ERROR = re.compile(rb'"finish_reason":\s*"error"')
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')


# A quote inside a JSON string is always escaped, so these match JSON's own keys only.
IDS = re.compile(rb'"(prompt_token_ids|token_ids)":\s?\[([\d,\s]*)\]')


def strip_ids(block: bytes) -> bytes:
    """Events without token ids."""
    return IDS.sub(rb'"\1":null', block)


class EventBlocks:
    """Cuts a byte stream into blocks of whole events. Usually a read is one block and nothing is copied."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events that `data` completes, as one block; empty where there is none."""
        if self._rest:
            data = self._rest + data
        if data.endswith(_END):
            self._rest = b""
            return data
        cut = data.rfind(_END) + len(_END)
        if cut < len(_END):
            self._rest = data
            return b""
        self._rest = data[cut:]
        return data[:cut]

    @property
    def rest(self) -> bytes:
        """What has come of an event that is not whole."""
        return self._rest


def events(block: bytes) -> list[bytes]:
    """The events of a block, each with its blank line."""
    return [event + _END for event in block.split(_END) if event]


def event_json(event: bytes) -> dict[str, Any] | None:
    """The JSON object of an event; None for comments, `[DONE]` and anything else."""
    if not event.startswith(b"data: {"):
        return None
    try:
        value = json.loads(event[6:])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def failure_in(block: bytes) -> tuple[bytes, FailureKind, str] | None:
    """(the events before the failure, "error_event" or "finish_error", message); None where all is well.

    vLLM reports a failure inside a stream in two ways, and sends `[DONE]` after either.
    """
    if b'"error"' not in block:  # the fast way out for all but a few blocks
        return None
    before = b""
    for event in events(block):
        if _FINISH_ERROR.search(event):
            return before, "finish_error", "the generation ended with an error"
        if event.startswith((b'data: {"error"', b'data: {"object":"error"')):
            body = event_json(event) or {}
            error = body.get("error", body)
            message = error.get("message") if isinstance(error, dict) else error
            return before, "error_event", str(message or "the engine reported an error")
        before += event
    return None


def finished_with_error(answer: bytes) -> bool:
    """Whether a plain answer (HTTP 200) says that its generation failed."""
    return _FINISH_ERROR.search(answer) is not None


def completion_tokens(answer: bytes) -> int | None:
    """The usage's count of generated tokens, from the last place that gives one."""
    found = _TOKENS.findall(answer[-2048:])
    return int(found[-1]) if found else None


def prompt_tokens(answer: bytes) -> int | None:
    """The usage's count of prompt tokens, likewise."""
    found = _PROMPT_TOKENS.findall(answer[-2048:])
    return int(found[-1]) if found else None
