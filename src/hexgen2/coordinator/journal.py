"""What a stream has given its client so far: enough to go on with it elsewhere.

Engines are asked for token ids (`return_token_ids`); the ids are written down here and taken out of the
events again where the client did not ask for them. That is done on the bytes: parsing every token's JSON
would cost more than everything else the coordinator does with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hexgen2.coordinator.replay import Record, is_repeatable
from hexgen2.coordinator.stream import IDS, event_json, events, strip_ids

_FINISHED = re.compile(rb'"finish_reason":\s?"')
_IDS_BEGIN, _ANY_IDS, _NO_IDS = b'"token_ids":[', b'token_ids":[', b'"token_ids":null'

# Blocks within which reasoning shows, if there is to be any.
_OPENING_BLOCKS = 8


def continuation_obstacle(body: Mapping[str, Any], chat: bool) -> str | None:
    """Why a stream cannot be taken up by another engine from its token ids; None where it can.

    The other engine sees the tokens generated so far as part of the prompt. That is the same generation unless
    something depends on which tokens are output (penalties, grammars, parsers) or is not shown as tokens at
    all.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(item, int) for item in prompt):
        return "several_prompts"
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1) or body.get("use_beam_search"):
        return "several_sequences"
    if body.get("prompt_embeds") is not None or (chat and _has_media(body.get("messages"))):
        return "prompt_is_not_text"
    if body.get("structured_outputs") is not None or _restricts(body.get("response_format")):
        return "structured_output"
    if chat and body.get("tools") and body.get("tool_choice") != "none":
        return "tools"
    if chat and (body.get("logprobs") or body.get("echo") or body.get("include_reasoning") is False):
        return "chat_extras"
    if body.get("echo") and (
        body.get("stop")
        or body.get("logprobs") is not None
        or (_prompt_text(body) is None and not body.get("return_token_ids"))
    ):
        return "echo"
    for field in ("presence_penalty", "frequency_penalty", "repetition_detection", "thinking_token_budget"):
        if body.get(field):
            return field
    return None


def _prompt_text(body: Mapping[str, Any]) -> str | None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return prompt if isinstance(prompt, str) else None


def _has_media(messages: Any) -> bool:
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, str) and _type_of(part) != "text" for part in parts)


def _type_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _restricts(response_format: Any) -> bool:
    return isinstance(response_format, dict) and _type_of(response_format) not in (None, "text")


class Journal:
    """The record of one stream. With `record` it goes on elsewhere by running its request anew; without one,
    and without an obstacle, from its token ids."""

    def __init__(self, body: Mapping[str, Any], chat: bool, off: bool = False) -> None:
        self.obstacle = "off" if off else continuation_obstacle(body, chat)
        repeatable = not off and is_repeatable(body)
        self.record = Record(body, chat) if repeatable and self.obstacle is not None else None
        # Random numbers that can be drawn again make such a stream repeatable too.
        self.needs_seed = not (off or repeatable or self.obstacle is None) and body.get("seed") is None
        self.shows_ids = bool(body.get("return_token_ids"))
        self._finished = False
        # Raw, for the case that reasoning turns up: the record must know everything from the beginning.
        self._opening: list[bytes] | None = [] if chat and repeatable and self.obstacle is None else None
        self._body = body
        self._asked = self.asks_for_ids
        self.prompt_ids: list[int] | None = None
        self.token_ids: list[int] = []
        self.text = ""  # generated text that was sent; kept only where stop strings need it
        self.next_text_offset = 0  # of log probabilities; likewise
        self._chat = chat
        self._keeps_text = bool(body.get("stop"))
        self._keeps_offsets = not chat and body.get("logprobs") is not None
        self._first_event = b""
        # vLLM gives no echo to whoever asks for token ids: where we do so unbidden, we put the prompt back.
        wants_echo = self.asks_for_ids and body.get("echo") and not chat
        self._echo = _prompt_text(body) if wants_echo else None

    @property
    def asks_for_ids(self) -> bool:
        """Whether the engine must be asked for ids that the client did not ask for."""
        if self.record is not None:
            return self.record.asks_for_ids
        return self.obstacle is None and not self.shows_ids

    @property
    def finished(self) -> bool:
        """Whether only the end of the stream is missing."""
        return self._finished if self.record is None else self.record.finished

    @finished.setter
    def finished(self, value: bool) -> None:
        self._finished = value

    @property
    def generated(self) -> int | None:
        """Tokens sent; None where they are not counted."""
        if self.record is not None:
            return self.record.generated if self.record.counts else None
        return len(self.token_ids) if self.obstacle is None else None

    def note(self, block: bytes) -> bytes:
        """Write down what a block of an engine's events gives; the block as the client is to see it."""
        first = not self._first_event
        if first:
            self._first_event = events(block)[0]
        if self.record is not None:
            return self.record.note(block)
        if self.obstacle is not None:
            return strip_ids(block) if self._asked else block
        if first and self._echo:
            echo = json.dumps(self._echo)[1:-1].encode()
            block = block.replace(b'"text":"', b'"text":"' + echo, 1)
        if self._chat and b'"reasoning":"' in block:
            # The engine takes reasoning apart from content; a continuation from ids would not.
            self.obstacle = "reasoning"
            if self._opening is not None:
                self.record = Record(self._body, self._chat)
                for earlier in self._opening:
                    self.record.note(earlier)
                self._opening = None
                return self.record.note(block)
        if self._opening is not None:
            self._opening.append(block)
            if len(self._opening) > _OPENING_BLOCKS:
                self._opening = None
        if self._keeps_text or self._keeps_offsets:
            self._parse(block)
        # Nearly every block is the event of one token: that is done without a regular expression.
        at = block.find(_IDS_BEGIN)
        end = block.find(b"]", at)
        number = block[at + len(_IDS_BEGIN) : end]
        if at < 0 or not number.isdigit() or block.count(_ANY_IDS) > 1:
            self._finished = self._finished or _FINISHED.search(block) is not None
            return IDS.sub(self._take_ids, block)
        self._finished = self._finished or b'"finish_reason":"' in block
        self.token_ids.append(int(number))
        return block if self.shows_ids else block[:at] + _NO_IDS + block[end + 1 :]

    def _take_ids(self, match: re.Match[bytes]) -> bytes:
        ids = [int(number) for number in match[2].split(b",")] if match[2].strip() else []
        if match[1] == b"token_ids":
            self.token_ids += ids
        elif self.prompt_ids is None:
            self.prompt_ids = ids
        return match[0] if self.shows_ids else b'"' + match[1] + b'":null'

    def _parse(self, block: bytes) -> None:
        for event in events(block):
            for choice in (event_json(event) or {}).get("choices", ()):
                self.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                logprobs = choice.get("logprobs")
                if self._keeps_offsets and logprobs and logprobs["tokens"]:
                    self.next_text_offset = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])

    @property
    def frame(self) -> dict[str, Any]:
        """id, object, created and model of the stream's events."""
        first = event_json(self._first_event) or {}
        return {key: first[key] for key in ("id", "object", "created", "model") if key in first}
