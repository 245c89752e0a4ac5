"""What a stream has said so far, as sums rather than as events: the same generation, cut into events elsewhere,
adds up to the same. Pure.

Texts add up (content, reasoning, the arguments of each tool call), and so do token ids and log probabilities.
Tool-call ids are drawn by the engine and may differ between two runs; everything else must not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Json = dict[str, Any]
_Key = TypeVar("_Key")


class Differs(Exception):
    """The other run did not say the same."""


@dataclass
class Said:
    """The sums of one choice. `texts` by the key of the delta (or "text"), tool arguments by their number."""

    texts: dict[str, str] = field(default_factory=dict)
    arguments: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of the tool calls that have begun
    ids: list[int] = field(default_factory=list)
    logprobs: int = 0
    role: bool = False
    finish: str | None = None

    def add(self, choice: Mapping[str, Any]) -> None:
        """Take in one chunk's choice."""
        for key, text in _texts(choice):
            self.texts[key] = self.texts.get(key, "") + text
        delta = choice.get("delta") or {}
        self.role = self.role or bool(delta.get("role"))
        for call in delta.get("tool_calls") or ():
            number, function = call.get("index", 0), call.get("function") or {}
            self.names[number] = self.names.get(number, "") + (function.get("name") or "")
            self.arguments[number] = self.arguments.get(number, "") + (function.get("arguments") or "")
        self.ids += choice.get("token_ids") or ()
        self.logprobs += _logprob_count(choice.get("logprobs"))
        self.finish = self.finish or choice.get("finish_reason")

    def check(self, choice: Mapping[str, Any], other: Said) -> None:
        """Differs unless a chunk's choice, before it is added here, says what the other said at that place."""
        for key, text in _texts(choice):
            _agree(text, self.texts.get(key, ""), other.texts.get(key, ""))
        calls = dict(self.arguments)
        for call in (choice.get("delta") or {}).get("tool_calls") or ():
            number, function = call.get("index", 0), call.get("function") or {}
            text = function.get("arguments") or ""
            _agree(text, calls.get(number, ""), other.arguments.get(number, ""))
            calls[number] = calls.get(number, "") + text
            _agree(function.get("name") or "", self.names.get(number, ""), other.names.get(number, ""))
        ids = choice.get("token_ids") or ()
        there = other.ids[len(self.ids) : len(self.ids) + len(ids)]
        if list(ids[: len(there)]) != there:
            raise Differs

    def catch_up(self, now: Said) -> None:
        """Take over what the other has said more of."""
        _take_longer(self.texts, now.texts)
        _take_longer(self.arguments, now.arguments)
        _take_longer(self.names, now.names)
        if len(now.ids) > len(self.ids):
            self.ids = now.ids
        self.logprobs = max(self.logprobs, now.logprobs)
        self.role = self.role or now.role
        self.finish = self.finish or now.finish

    def reaches(self, other: Said) -> bool:
        """Whether all that the other said is said here too."""
        longer = all(len(self.texts.get(key, "")) >= len(text) for key, text in other.texts.items())
        called = all(len(self.arguments.get(n, "")) >= len(text) for n, text in other.arguments.items())
        return longer and called and len(self.ids) >= len(other.ids)


def beyond(choice: Mapping[str, Any], before: Said, sent: Said) -> Json | None:
    """What of a chunk's choice, that follows on `before`, is not in `sent` yet; None where that is nothing."""
    rest: Json = {**choice}
    news = False
    if "delta" in choice:
        rest["delta"], news = _delta_beyond(choice["delta"] or {}, before, sent)
    elif isinstance(choice.get("text"), str):
        rest["text"] = choice["text"][_skip(before.texts.get("text", ""), sent.texts.get("text", "")) :]
        news = bool(rest["text"])
    ids = choice.get("token_ids")
    if ids:
        rest["token_ids"] = ids[max(0, len(sent.ids) - len(before.ids)) :]
        news = news or bool(rest["token_ids"])
    if "prompt_token_ids" in choice and (sent.ids or sent.texts or sent.role):
        rest["prompt_token_ids"] = None  # it came with the first chunk
    if choice.get("logprobs"):
        rest["logprobs"] = _logprobs_from(choice["logprobs"], max(0, sent.logprobs - before.logprobs))
        news = news or rest["logprobs"] is not None
    if sent.finish is not None:
        return None
    return rest if news or choice.get("finish_reason") is not None else None


def _delta_beyond(delta: Mapping[str, Any], before: Said, sent: Said) -> tuple[Json, bool]:
    rest: Json = {**delta}
    news = False
    if sent.role:
        rest.pop("role", None)
    elif delta.get("role"):
        news = True
    for key, text in list(delta.items()):
        if isinstance(text, str) and key != "role":
            rest[key] = text[_skip(before.texts.get(key, ""), sent.texts.get(key, "")) :]
            news = news or bool(rest[key])
            if not rest[key] and text:
                del rest[key]
    calls = delta.get("tool_calls")
    if calls:
        seen = dict(before.arguments)  # several parts of one call may come in one chunk
        rest["tool_calls"] = [call for part in calls if (call := _call_beyond(part, seen, sent)) is not None]
        news = news or bool(rest["tool_calls"])
        if not rest["tool_calls"]:
            del rest["tool_calls"]
    return rest, news


def _call_beyond(call: Mapping[str, Any], seen: dict[int, str], sent: Said) -> Json | None:
    number, function = call.get("index", 0), dict(call.get("function") or {})
    arguments, known = function.get("arguments") or "", number in sent.names
    skip = _skip(seen.get(number, ""), sent.arguments.get(number, ""))
    seen[number] = seen.get(number, "") + arguments
    if not known:
        return dict(call)
    rest = arguments[skip:]
    if not rest:
        return None
    # The client knows the call by the id of the first run.
    return {"index": number, "function": {"arguments": rest}}


def _skip(before: str, sent: str) -> int:
    return max(0, len(sent) - len(before))


def _texts(choice: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        for key, text in delta.items():
            if isinstance(text, str) and key != "role":
                yield key, text
    elif isinstance(choice.get("text"), str):
        yield "text", choice["text"]


def _logprob_count(logprobs: Any) -> int:
    if not isinstance(logprobs, dict):
        return 0
    return len(logprobs.get("content") or logprobs.get("tokens") or ())


def _logprobs_from(logprobs: Mapping[str, Any], skip: int) -> Json | None:
    """Without the first `skip` tokens; None where none is left."""
    rest = {key: value[skip:] if isinstance(value, list) else value for key, value in logprobs.items()}
    return rest if _logprob_count(rest) else None


def _take_longer(mine: dict[_Key, str], theirs: Mapping[_Key, str]) -> None:
    for key, text in theirs.items():
        if key not in mine or len(text) > len(mine[key]):
            mine[key] = text


def _agree(text: str, before: str, other: str) -> None:
    """Differs unless `text`, which follows on `before`, is in `other` there, as far as that goes."""
    there = other[len(before) : len(before) + len(text)]
    if text[: len(there)] != there:
        raise Differs
