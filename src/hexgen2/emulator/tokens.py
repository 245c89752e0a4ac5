"""A made-up tokenizer and a made-up model, both deterministic.

The next token is a function of ALL tokens before it. A stream that loses, doubles or swaps one token
therefore differs from there on, and a continuation from prompt + generated ids gives exactly the tokens
that the first engine would have given: what tests of routing and migration need to see.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

VOCABULARY = 32_000
SPECIAL = 0
"""A special token: /detokenize spells it out, streams leave it out unless asked not to."""
_PRIME = (1 << 61) - 1
_WORD = re.compile(r"\S+")
_TOKEN_TEXT = re.compile(r"t(\d+)")


def token_text(token: int) -> str:
    """The text of one token, with its leading space."""
    return f" t{token}"


def decode(tokens: Iterable[int]) -> str:
    return "".join(map(token_text, tokens))


def encode(text: str) -> list[int]:
    """Words to ids; `encode(decode(ids)) == ids`."""
    ids = []
    for word in _WORD.findall(text):
        own = _TOKEN_TEXT.fullmatch(word)
        ids.append((int(own[1]) if own else zlib.crc32(word.encode("utf-8", "surrogatepass"))) % VOCABULARY)
    return ids or [0]


class TokenModel:
    """The sequence after some tokens: a rolling hash that each new token is folded into."""

    __slots__ = ("_allowed", "_state")

    def __init__(self, prompt: Sequence[int], allowed: Sequence[int] = ()) -> None:
        self._state = 7
        self._allowed = allowed
        for token in prompt:
            self._fold(token)

    def _fold(self, token: int) -> None:
        self._state = (self._state * 1_000_003 + token + 1) % _PRIME

    def next_token(self) -> int:
        token = (self._state >> 7) % VOCABULARY
        if self._allowed:
            token = self._allowed[token % len(self._allowed)]
        self._fold(token)
        return token


def generate(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow `prompt`."""
    model = TokenModel(prompt)
    return [model.next_token() for _ in range(count)]


def fingerprint(prompt: Sequence[int]) -> int:
    """Names a prompt's KV cache, so that a transfer of the wrong one shows as wrong tokens."""
    return zlib.crc32(",".join(map(str, prompt)).encode())
