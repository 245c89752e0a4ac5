"""The text of tokens that an engine generated before it was lost, as another one would have streamed it.

Streams leave special tokens out (a chat template's marks, an end of sequence that `ignore_eos` passes), but
`/detokenize` spells them out, and vLLM has no question whose answer says which tokens are special. What the
client has got shows where such a token may be; the engine is then made to generate it. (A special token right
before text that spells the same would not be noticed.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

_PARTIAL = "\ufffd"
"""How the bytes of a character read that is not whole yet."""


class TextDiffers(Exception):
    """The tokens do not read as what was sent."""


class Reader(Protocol):
    """An engine that has the tokenizer."""

    async def text(self, tokens: Sequence[int]) -> str:
        """The tokens spelled out, the special ones too."""
        ...

    async def streamed(self, token: int) -> str:
        """What a stream shows of it."""
        ...


async def generated_text(
    reader: Reader, before: Sequence[int], tokens: Sequence[int], sent: str, skips_special: bool
) -> str:
    """The text of ``tokens``, of which ``sent`` has been shown; TextDiffers where they do not read so.

    ``before``: some tokens that precede them, since how a token reads may depend on those. A character at the
    end whose bytes are not all there is left out: the next engine gives it whole.
    """
    kept = list(tokens)
    prefix = await reader.text(before)

    async def read(count: int) -> str:
        whole = await reader.text([*before, *kept[:count]])
        if not whole.startswith(prefix):
            raise TextDiffers
        return whole[len(prefix) :].rstrip(_PARTIAL)

    async def first(wanted: Callable[[str], bool]) -> int:
        """The fewest tokens whose text is as wanted; that of all of them is."""
        low, high = -1, len(kept)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if wanted(await read(middle)) else (middle, high)
        return high

    async def is_hidden(token: int) -> bool:
        return skips_special and _PARTIAL not in await reader.text([token]) and not await reader.streamed(token)

    while not (text := await read(len(kept))).startswith(sent):
        if sent.startswith(text):
            raise TextDiffers  # tokens are missing
        parted = kept[await first(lambda text: not (text.startswith(sent) or sent.startswith(text))) - 1]
        if not await is_hidden(parted):
            raise TextDiffers
        kept = [token for token in kept if token != parted]
    if text == sent:
        return text
    shown = await first(lambda text: text.startswith(sent))
    hidden = {token for token in set(kept[shown:]) - set(kept[:shown]) if await is_hidden(token)}
    kept = [token for token in kept if token not in hidden]
    return await read(len(kept))
