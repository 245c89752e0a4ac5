"""Going on with a broken stream by running its request anew: what was sent already is passed over.

For streams that cannot be taken up from their token ids, since something depends on which tokens were output
(penalties, grammars, parsers of tool calls). It needs a generation that comes out the same: greedy, or with a
seed. Whether it did is seen from the token ids and the texts; where they differ, the stream ends in an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hexgen2.coordinator.request import encode
from hexgen2.coordinator.stream import DONE, event_json, events, strip_ids
from hexgen2.coordinator.transcript import Differs, Said, beyond

__all__ = ["Differs", "Record", "Replay", "is_repeatable"]


def is_repeatable(body: Mapping[str, Any]) -> bool:
    """Whether the same request gives the same answer again.

    A request that names no temperature gets the model's own, which is seldom 0. Seeded sampling repeats on
    engines that compute the same numbers; where they do not, the comparison finds out.
    """
    greedy = body.get("temperature") == 0 and not isinstance(body.get("temperature"), bool)
    return greedy or isinstance(body.get("seed"), int)


class Record:
    """What a stream has said, choice by choice, and how many tokens its prompts have."""

    def __init__(self, body: Mapping[str, Any], chat: bool) -> None:
        prompt, n, options = body.get("prompt"), body.get("n"), body.get("stream_options")
        several = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
        self._n = n if isinstance(n, int) and n > 0 else 1
        self._choices = self._n * (len(prompt) if several and isinstance(prompt, list) else 1)
        # With echo vLLM leaves out the prompt's text where ids are asked for.
        self.asks_for_ids = not body.get("return_token_ids") and not body.get("echo")
        self.counts = self.asks_for_ids or bool(body.get("return_token_ids"))
        self._wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self._chat = chat
        self._prompt_tokens: dict[int, int] = {}
        self.said: dict[int, Said] = {}

    @property
    def finished(self) -> bool:
        """Whether only the end of the stream is missing, and all that it says is known."""
        ended = sum(said.finish is not None for said in self.said.values())
        return ended == self._choices and (self.counts or not self._wants_usage)

    @property
    def generated(self) -> int:
        return sum(len(said.ids) for said in self.said.values())

    def of(self, choice: Mapping[str, Any]) -> Said:
        return self.said.setdefault(choice.get("index", 0), Said())

    def usage(self) -> dict[str, int]:
        """As the engine would have counted; a prompt counts once, whatever n."""
        prompt = sum(count for index, count in self._prompt_tokens.items() if index % self._n == 0)
        done = self.generated
        return {"prompt_tokens": prompt, "total_tokens": prompt + done, "completion_tokens": done}

    def note(self, block: bytes) -> bytes:
        """Write down a block of events; the block as the client is to see it."""
        shown = []
        for event in events(block):
            body = event_json(event)
            if body is not None and body.get("choices"):
                self.note_prompt(body)
                for choice in body["choices"]:
                    self.of(choice).add(choice)
                if not self.shows(body["choices"]):
                    continue
            shown.append(self.without_ids(event))
        return b"".join(shown)

    def note_prompt(self, body: Mapping[str, Any]) -> None:
        for choice in body["choices"]:
            ids = body.get("prompt_token_ids") if self._chat else choice.get("prompt_token_ids")
            if ids:
                self._prompt_tokens.setdefault(choice.get("index", 0), len(ids))

    def shows(self, choices: Iterable[Mapping[str, Any]]) -> bool:
        """Whether a chunk says anything to the client, besides ids that only we asked for."""
        if not (self.asks_for_ids and self._chat):
            return True
        return any(
            choice.get("delta") or choice.get("logprobs") or choice.get("finish_reason") for choice in choices
        )

    def without_ids(self, event: bytes) -> bytes:
        """An event without the ids that only we asked for."""
        return strip_ids(event) if self.asks_for_ids else event


class Replay:
    """Turns the new run's events into more of the client's stream. `Differs` where they do not fit it."""

    ended = False

    def __init__(self, record: Record, frame: dict[str, Any]) -> None:
        self._record = record
        self._frame = frame
        self._now: dict[int, Said] = {}
        self._began = bool(record.said)

    def block(self, block: bytes) -> bytes:
        """A block for the client; empty where all of it was sent before."""
        shown = b""
        for event in events(block):
            body = event_json(event)
            if event == DONE:
                self._check_all_was_said()
                shown += event
            elif body is None:
                shown += event
            elif not body.get("choices"):
                shown += _event(body | self._frame)
            else:
                shown += self._chunk(body)
        return shown

    def _chunk(self, body: dict[str, Any]) -> bytes:
        record, news = self._record, []
        record.note_prompt(body)
        for choice in body["choices"]:
            now, sent = self._now.setdefault(choice.get("index", 0), Said()), record.of(choice)
            now.check(choice, sent)
            rest = beyond(choice, now, sent)
            now.add(choice)
            if now.finish is not None and not now.reaches(sent):
                raise Differs
            sent.catch_up(now)
            if rest is not None:
                news.append(rest)
        if not news:
            return b""
        shown = body | self._frame | {"choices": news}
        if "prompt_token_ids" in body and self._began:
            shown["prompt_token_ids"] = None  # the first run gave them
        return record.without_ids(_event(shown)) if record.shows(news) else b""

    def _check_all_was_said(self) -> None:
        nothing = Said()
        if not all(self._now.get(index, nothing).reaches(said) for index, said in self._record.said.items()):
            raise Differs


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + encode(body) + b"\n\n"
