"""Going on with a broken stream on another engine: from the prompt's ids and the ids generated so far. Pure.

The other engine gets a /v1/completions request with token ids as its prompt; what it answers is put into
events that look like the first engine's. The client sees one unbroken stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hexgen2.coordinator.journal import Journal
from hexgen2.coordinator.request import encode
from hexgen2.coordinator.seam import StopSeam
from hexgen2.coordinator.stream import DONE, event_json, events

_DEFAULT_MAX_TOKENS = 16  # of /v1/completions

# What describes the prompt or the shape of the first answer; the rest (sampling, priorities, unknown
# fields) goes on.
_DROPPED = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "best_of",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "echo",
        "functions",
        "function_call",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "min_tokens",
        "n",
        "parallel_tool_calls",
        "prompt",
        "reasoning_effort",
        "request_id",
        "response_format",
        "return_prompt_text",
        "stream",
        "stream_options",
        "suffix",
        "tool_choice",
        "tools",
        "top_logprobs",
        "truncate_prompt_tokens",
        "truncation_side",
    }
)


def stop_strings(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    return [stop] if isinstance(stop, str) else list(stop)


def tokens_left(body: Mapping[str, Any], chat: bool, journal: Journal, max_model_len: int | None) -> int | None:
    """How many tokens may still come; None where that is not known."""
    limit = body.get("max_tokens")
    if chat and body.get("max_completion_tokens") is not None:
        limit = body["max_completion_tokens"]
    if limit is None and not chat:
        limit = _DEFAULT_MAX_TOKENS
    room = None
    if max_model_len is not None and journal.prompt_ids is not None:
        room = max_model_len - len(journal.prompt_ids)
    bounds = [bound for bound in (limit, room) if bound is not None]
    return min(bounds) - len(journal.token_ids) if bounds else None


def continuation_body(body: Mapping[str, Any], chat: bool, journal: Journal, left: int) -> dict[str, Any]:
    """The /v1/completions body that generates the `left` tokens still missing."""
    assert journal.prompt_ids is not None, "without the prompt's ids there is no continuation"
    kept = {key: value for key, value in body.items() if key not in _DROPPED}
    if chat:
        kept.pop("logprobs", None)  # a flag in chat, a number here
    done = len(journal.token_ids)
    least = max(0, int(body.get("min_tokens") or 0) - done)
    return kept | {
        "prompt": [*journal.prompt_ids, *journal.token_ids],
        "max_tokens": left,
        "stream": True,
        "return_token_ids": True,
        **({"min_tokens": least} if least else {}),
    }


class Splice:
    """Turns the continuing engine's events into more of the client's stream."""

    def __init__(
        self, body: Mapping[str, Any], chat: bool, journal: Journal, seam: StopSeam | None = None
    ) -> None:
        options = body.get("stream_options") or {}
        self._body = body
        self._usage = bool(options.get("include_usage"))
        self._running_usage = self._usage and bool(options.get("continuous_usage_stats"))
        self._chat = chat
        self._journal = journal
        self._seam = seam
        self._frame = journal.frame
        self._offset = journal.next_text_offset
        self._fingerprint: dict[str, Any] = {}  # vLLM puts it on a stream's last message
        self.ended = False  # a stop string was found here: the engine's further events are not wanted

    def block(self, block: bytes) -> bytes:
        """A block for the client; empty where nothing is to be sent for this one."""
        sent = b""
        for event in events(block):
            if self.ended:
                break
            if event == DONE:
                sent += self.end()
                break
            body = event_json(event)
            if body is not None and body.get("choices"):
                if body.get("system_fingerprint") is not None:
                    self._fingerprint = {"system_fingerprint": body["system_fingerprint"]}
                sent += self._chunk(body["choices"][0])
        return sent

    def end(self) -> bytes:
        """What closes the stream: usage where it was asked for, and `[DONE]`."""
        self.ended = True
        return closing(self._body, self._journal, self._fingerprint)

    def _chunk(self, choice: Mapping[str, Any]) -> bytes:
        journal = self._journal
        ids = choice.get("token_ids") or []
        journal.token_ids += ids
        finish, reason = choice.get("finish_reason"), choice.get("stop_reason")
        text = choice.get("text") or ""
        if self._seam is not None:
            text, stop = self._seam.add(text, last=finish is not None)
            if stop is not None:
                finish, reason = "stop", stop
        journal.text += text
        journal.finished = journal.finished or finish is not None
        shown_ids = ids if journal.shows_ids else None
        if self._chat:
            shown: dict[str, Any] = {"index": 0, "delta": {"content": text}, "logprobs": None}
            shown["finish_reason"] = finish
            if finish is not None:
                shown["stop_reason"] = reason
            shown["token_ids"] = shown_ids
        else:
            shown = {
                "index": 0,
                "text": text,
                "logprobs": self._shifted(choice.get("logprobs")),
                "finish_reason": finish,
                "stop_reason": reason,
                "prompt_token_ids": None,
                "token_ids": shown_ids,
            }
        body = self._frame | {"choices": [shown]}
        if self._running_usage:
            body["usage"] = _used(self._journal)
        if finish is not None and not self._usage:
            body |= self._fingerprint
        sent = _event(body)
        if self._seam is not None and finish == "stop" and choice.get("finish_reason") is None:
            sent += self.end()
        return sent

    def _shifted(self, logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Log probabilities whose text offsets count from the first engine's text."""
        if logprobs is None or not logprobs["tokens"]:
            return logprobs
        offsets = [offset + self._offset for offset in logprobs["text_offset"]]
        self._journal.next_text_offset = offsets[-1] + len(logprobs["tokens"][-1])
        return logprobs | {"text_offset": offsets}


def closing(body: Mapping[str, Any], journal: Journal, fingerprint: Mapping[str, Any] | None = None) -> bytes:
    """What closes a stream whose last token has been sent: usage where it was asked for, and `[DONE]`."""
    if not (body.get("stream_options") or {}).get("include_usage"):
        return DONE
    return _event(journal.frame | {"choices": [], "usage": _used(journal)} | dict(fingerprint or {})) + DONE


def _used(journal: Journal) -> dict[str, int]:
    if journal.record is not None:
        return journal.record.usage()
    prompt, generated = len(journal.prompt_ids or ()), len(journal.token_ids)
    return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + encode(body) + b"\n\n"
