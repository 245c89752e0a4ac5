"""vLLM's OpenAI protocol, as far as an engine without a model can speak it: requests in, answers and chunks
out.

Pure functions. The order and the presence of fields follow vLLM 0.32, since a proxy may rely on either.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hexgen2.emulator import tokens

Body = dict[str, Any]

COMPLETION_DEFAULT_TOKENS = 16
CHAT_DEFAULT_TOKENS = 64


class Refused(Exception):
    """The request is wrong: HTTP status and the message of the error body."""

    def __init__(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, kind, param)


def error_body(status: int, message: str, kind: str, param: str | None = None) -> Body:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True)
class Generation:
    """A request after parsing: what to generate and how to show it."""

    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    max_tokens: int
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    keep_stop: bool
    echo: str  # what is put before the first text, "" without echo
    logprobs: bool
    token_ids: bool
    kv: Body | None
    allowed: tuple[int, ...] = ()  # token ids that may be generated; empty: all
    skips_special: bool = True  # special tokens are not shown

    @property
    def fetched_later(self) -> bool:
        """Whether another engine will fetch the KV cache."""
        return bool(self.kv and self.kv.get("do_remote_decode"))


def parse(body: Any, chat: bool, model_names: tuple[str, ...], max_model_len: int) -> Generation:
    """Check a body as vLLM would; `Refused` where it is wrong."""
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    _check_types(body)
    model = body.get("model")
    if model is not None and model not in model_names:
        raise Refused(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
    stream = bool(body.get("stream"))
    options = body.get("stream_options")
    if options and not stream:
        raise Refused(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
    prompts = [_chat_prompt(body)] if chat else _completion_prompts(body)
    if body.get("prompt_logprobs") and stream:
        raise Refused(400, "`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
    max_tokens = _max_tokens(body, chat)
    echo = bool(body.get("echo")) and not chat
    if max_tokens < (0 if echo else 1):
        raise Refused(400, f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    if int(body.get("min_tokens") or 0) > max_tokens:
        raise Refused(
            400, f"min_tokens must be less than or equal to max_tokens={max_tokens}", param="min_tokens"
        )
    longest = max(map(len, prompts))
    if longest + max_tokens > max_model_len:
        raise Refused(
            400, f"This model's maximum context length is {max_model_len} tokens, not {longest + max_tokens}."
        )
    stop = body.get("stop") or ()
    if isinstance(stop, list) and "" in stop:
        raise Refused(400, "stop cannot contain an empty string.", param="stop")
    return Generation(
        chat=chat,
        prompts=tuple(map(tuple, prompts)),
        n=int(body.get("n") or 1),
        max_tokens=max_tokens,
        stream=stream,
        include_usage=bool(options and options.get("include_usage")),
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        keep_stop=bool(body.get("include_stop_str_in_output")),
        # As vLLM: who asks for token ids does not get the prompt's text.
        echo=_echo_text(body["prompt"]) if echo and not body.get("return_token_ids") else "",
        logprobs=body.get("logprobs") is not None and body.get("logprobs") is not False,
        token_ids=bool(body.get("return_token_ids")),
        kv=body.get("kv_transfer_params"),
        allowed=tuple(body.get("allowed_token_ids") or ()),
        skips_special=body.get("skip_special_tokens") is not False,
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a string"),
    "max_tokens": (_whole, "an integer"),
    "max_completion_tokens": (_whole, "an integer"),
    "min_tokens": (lambda value: _whole(value) and value >= 0, "an integer of at least 0"),
    "n": (lambda value: _whole(value) and 1 <= value <= 128, "an integer from 1 to 128"),
    "stop": (_texts, "a string or a list of strings"),
    "stream": (_flag, "true or false"),
    "stream_options": (_table, "an object"),
    "echo": (_flag, "true or false"),
    "return_token_ids": (_flag, "true or false"),
    "include_stop_str_in_output": (_flag, "true or false"),
    "logprobs": (lambda value: isinstance(value, int), "an integer or a flag"),
    "kv_transfer_params": (_table, "an object"),
    "allowed_token_ids": (_ids, "a list of integers"),
    "skip_special_tokens": (_flag, "true or false"),
}


def _check_types(body: Body) -> None:
    """The fields that are used here; null stands for a field that is not given."""
    for field, (fits, words) in _TYPES.items():
        if body.get(field) is not None and not fits(body[field]):
            raise Refused(400, f"{field} must be {words}", param=field)


def check_text(raw: bytes) -> None:
    """Refused where a string holds half of a surrogate pair, which is no text: vLLM refuses it too."""
    if b"\\u" in raw:
        try:
            json.dumps(json.loads(raw), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refused(400, "a string is not valid Unicode") from None


def token_ids(body: Any) -> list[int]:
    """The `tokens` of a /detokenize body."""
    ids = body.get("tokens") if isinstance(body, dict) else None
    if not isinstance(ids, list) or not _ids(ids):
        raise Refused(400, "tokens must be a list of token ids", param="tokens")
    return ids


def _max_tokens(body: Body, chat: bool) -> int:
    if chat:
        asked = body.get("max_completion_tokens")
        asked = body.get("max_tokens") if asked is None else asked
        return CHAT_DEFAULT_TOKENS if asked is None else int(asked)
    asked = body.get("max_tokens")
    return COMPLETION_DEFAULT_TOKENS if asked is None else int(asked)


def _completion_prompts(body: Body) -> list[list[int]]:
    prompt = body.get("prompt")
    if not prompt:
        raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if isinstance(prompt, str):
        return [tokens.encode(prompt)]
    if isinstance(prompt, list) and all(map(_whole, prompt)):
        return [prompt]
    if isinstance(prompt, list) and all(_is_prompt(item) for item in prompt):
        return [tokens.encode(item) if isinstance(item, str) else item for item in prompt]
    raise Refused(400, "prompt must be a string, a list of strings, or token ids", param="prompt")


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_whole, value)))


def _chat_prompt(body: Body) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise Refused(400, "messages must be a list of objects with a role", param="messages")
    parts = [f"<{m['role']}> {json.dumps(m.get('content'))}" for m in messages]
    return tokens.encode(" ".join([*parts, "<assistant>"]))


def _echo_text(prompt: Any) -> str:
    """The text of a single prompt, given as text or as ids; several prompts are not echoed here."""
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    return tokens.decode(prompt) if all(isinstance(token, int) for token in prompt) else ""


def _logprobs(generation: Generation, ids: list[int], offset: int) -> Body | None:
    """Made-up log probabilities, a function of the id alone."""
    if not generation.logprobs:
        return None
    values = [-(token % 97 + 1) / 100 for token in ids]
    texts = [tokens.token_text(token) for token in ids]
    if generation.chat:
        entries = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in zip(texts, values, strict=True)
        ]
        return {"content": entries}
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [{text: value} for text, value in zip(texts, values, strict=True)]
    return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": top}


def role_chunk(request_id: str, created: int, model: str, g: Generation, index: int) -> Body:
    """The first chunk of a chat stream: the role, and the prompt's ids where asked for."""
    choice = {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [choice],
        "prompt_token_ids": list(g.prompts[0]) if g.token_ids else None,
    }


def chunk(
    request_id: str,
    created: int,
    model: str,
    g: Generation,
    index: int,
    text: str,
    ids: list[int],
    finish: str | None,
    stop_reason: str | None,
    first: bool,
    offset: int,
) -> Body:
    """One stream chunk; `offset` is the length of the text before it."""
    shown_ids = ids if g.token_ids else None
    if g.chat:
        choice: Body = {"index": index, "delta": {"content": text}, "logprobs": _logprobs(g, ids, offset)}
        choice["finish_reason"] = finish
        if finish is not None:
            choice["stop_reason"] = stop_reason
        choice["token_ids"] = shown_ids
        kind = "chat.completion.chunk"
    else:
        choice = {
            "index": index,
            "text": text,
            "logprobs": _logprobs(g, ids, offset),
            "finish_reason": finish,
            "stop_reason": stop_reason,
            "prompt_token_ids": list(g.prompts[index // g.n]) if g.token_ids and first else None,
            "token_ids": shown_ids,
        }
        kind = "text_completion"
    return {"id": request_id, "object": kind, "created": created, "model": model, "choices": [choice]}


def answer_choice(
    g: Generation, index: int, text: str, ids: list[int], finish: str, stop_reason: str | None
) -> Body:
    """One choice of an answer that is not streamed."""
    common = {
        "logprobs": _logprobs(g, ids, 0),
        "finish_reason": finish,
        "stop_reason": stop_reason,
        "token_ids": ids if g.token_ids else None,
    }
    if g.chat:
        return {"index": index, "message": {"role": "assistant", "content": text}, **common}
    prompt_ids = list(g.prompts[index // g.n]) if g.token_ids else None
    return {"index": index, "text": text, **common, "prompt_logprobs": None, "prompt_token_ids": prompt_ids}


def answer(
    request_id: str, created: int, model: str, g: Generation, choices: list[Body], usage: Body, kv: Body | None
) -> Body:
    body: Body = {
        "id": request_id,
        "object": "chat.completion" if g.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
        "kv_transfer_params": kv,
    }
    if g.chat and g.token_ids:
        body["prompt_token_ids"] = list(g.prompts[0])
    return body


def usage(prompt_tokens: int, completion_tokens: int) -> Body:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def event(body: Body) -> bytes:
    """One SSE event, with JSON as compact as vLLM's."""
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


class TextOut:
    """Turns tokens to text and looks for stop strings; like vLLM it holds back what may begin one."""

    def __init__(self, stops: tuple[str, ...], keep_stop: bool, skips_special: bool = True) -> None:
        self._skips_special = skips_special
        self._stops = stops
        self._keep_stop = keep_stop
        self._hold = 0 if keep_stop or not stops else max(map(len, stops)) - 1
        self._text = ""
        self._shown = 0

    @property
    def shown(self) -> int:
        """Characters given out so far."""
        return self._shown

    def add(self, token: int, last: bool) -> tuple[str, str | None]:
        """The text to show now, and the stop string that ended the generation."""
        before = len(self._text)
        if token != tokens.SPECIAL or not self._skips_special:
            self._text += tokens.token_text(token)
        found = self._find(before)
        if found is not None:
            stop, at = found
            end = at + len(stop) if self._keep_stop else at
            shown, self._shown = self._text[self._shown : end], end
            return shown, stop
        end = len(self._text) if last else max(self._shown, len(self._text) - self._hold)
        shown, self._shown = self._text[self._shown : end], end
        return shown, None

    def _find(self, before: int) -> tuple[str, int] | None:
        best: tuple[str, int] | None = None
        for stop in self._stops:
            at = self._text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (best is None or at < best[1]):
                best = (stop, at)
        return best
