"""How long a request's prompt is, about, before any engine has seen it, and how long an answer it asks for.

Prompts given as token ids are counted. Text is divided by the mean number of characters per token, learned from
the answers' counts of prompt tokens; asking an engine's /tokenize would cost a round trip per request and say
little more, since classes are far apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hexgen2.coordinator.request import ClientRequest
from hexgen2.specs.classes import RequestSize

CHARACTERS_PER_TOKEN = 4.0
"""Where the mean begins: about that of English text in the vocabularies of current models."""
MEMORY_TOKENS = 1_000_000.0
"""Prompt tokens after which an observation counts half as much; short, so that the mean follows the clients."""
PRIOR_TOKENS = 1_000.0
"""Prompt tokens that the first value is worth."""
_COMPLETIONS_DEFAULT = 16  # /v1/completions generates as many tokens where the request does not say


class SizeEstimator:
    """The size of requests, and the running mean of characters per token that it rests on."""

    def __init__(self) -> None:
        self._tokens = PRIOR_TOKENS
        self._characters = PRIOR_TOKENS * CHARACTERS_PER_TOKEN

    @property
    def characters_per_token(self) -> float:
        return self._characters / self._tokens

    def size(self, request: ClientRequest) -> RequestSize:
        """What is known of a request; no prompt length where it has none that could be counted."""
        count, characters = _prompt(request.body, request.chat)
        tokens = None if count is None else count + characters / self.characters_per_token
        return RequestSize(tokens, max_tokens(request.body, request.chat))

    def observe(self, request: ClientRequest, prompt_tokens: int | None) -> None:
        """Learn from the number of prompt tokens that an engine counted."""
        count, characters = _prompt(request.body, request.chat)
        if not prompt_tokens or count is None or not characters or prompt_tokens <= count:
            return
        tokens = prompt_tokens - count
        keep = 0.5 ** (tokens / MEMORY_TOKENS)
        self._tokens = self._tokens * keep + tokens
        self._characters = self._characters * keep + characters


def max_tokens(body: Mapping[str, Any], chat: bool) -> int | None:
    """The longest answer that a request asks for; None where it leaves that to the engine."""
    for field in ("max_completion_tokens", "max_tokens"):
        value = body.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None if chat else _COMPLETIONS_DEFAULT


def _prompt(body: Mapping[str, Any], chat: bool) -> tuple[int | None, int]:
    """(token ids, characters of text) of the prompt; ids None where there is nothing to count by."""
    if not chat:
        return _text_or_ids(body.get("prompt"))
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None, 0
    characters = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            characters += len(content)
        elif isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            characters += sum(len(text) for text in texts if isinstance(text, str))
    return 0, characters


def _text_or_ids(prompt: Any) -> tuple[int | None, int]:
    if isinstance(prompt, str):
        return 0, len(prompt)
    if not isinstance(prompt, list) or not prompt:
        return None, 0
    if all(isinstance(item, int) for item in prompt):
        return len(prompt), 0
    parts = [_text_or_ids(item) for item in prompt]
    if any(count is None for count, _ in parts):
        return None, 0
    return sum(count or 0 for count, _ in parts), sum(characters for _, characters in parts)
