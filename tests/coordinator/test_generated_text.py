"""The text of generated tokens, as a stream would have shown it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator.generated_text import TextDiffers, generated_text

WORDS = {1: "a", 2: " b", 3: "ab", 4: "<", 5: "</", 6: "s"}
SPECIAL = {8: "</s>", 9: "<pad>", 10: "<s>"}
HALVES = (11, 12)  # of a character
BEFORE = [8, 2]


def spelled(tokens: Sequence[int], special: bool) -> str:
    text, half = "", False
    for token in tokens:
        if token in HALVES:
            if half and token == HALVES[1]:
                text, half = text[:-1] + "ü", False
            else:
                text, half = text + "\ufffd", token == HALVES[0]
        elif special or token not in SPECIAL:
            text, half = text + (WORDS | SPECIAL)[token], False
    return text


class Tokenizer:
    """An engine that counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def text(self, tokens: Sequence[int]) -> str:
        self.asked += 1
        return spelled(tokens, special=True)

    async def streamed(self, token: int) -> str:
        self.asked += 1
        return spelled([token], special=False)


parts_of_text = st.sampled_from([[token] for token in (*WORDS, *SPECIAL)] + [list(HALVES)])
whole = st.lists(parts_of_text, max_size=40)


@given(whole, st.integers(0, 12))
async def test_it_reads_as_a_stream_would_have_shown_it(parts: list[list[int]], held_back: int) -> None:
    tokens = [token for part in parts for token in part]
    wanted = spelled(tokens, special=False)
    sent = wanted[: max(0, len(wanted) - held_back)]
    found = await generated_text(Tokenizer(), BEFORE, tokens, sent, skips_special=True)
    assert found == wanted


@given(whole, st.integers(0, 12))
async def test_with_special_tokens_shown(parts: list[list[int]], held_back: int) -> None:
    tokens = [token for part in parts for token in part]
    wanted = spelled(tokens, special=True)
    sent = wanted[: max(0, len(wanted) - held_back)]
    assert await generated_text(Tokenizer(), BEFORE, tokens, sent, skips_special=False) == wanted


@pytest.mark.parametrize(
    ("tokens", "sent"), [([1, 2], "a c"), ([1, 2], "a b and more"), ([1, 8, 2], "a</p>"), ([], "a")]
)
async def test_what_does_not_read_so(tokens: list[int], sent: str) -> None:
    with pytest.raises(TextDiffers):
        await generated_text(Tokenizer(), BEFORE, tokens, sent, skips_special=True)


async def test_half_a_character_at_the_end_is_left_out() -> None:
    assert await generated_text(Tokenizer(), BEFORE, [1, 2, 11], "a", skips_special=True) == "a b"


async def test_a_long_text_takes_few_questions() -> None:
    tokens = [1, 2, 3] * 300 + [8] + [3, 2, 1] * 300
    wanted = spelled(tokens, special=False)
    engine = Tokenizer()
    assert await generated_text(engine, BEFORE, tokens, wanted[:-3], skips_special=True) == wanted
    assert engine.asked < 50
