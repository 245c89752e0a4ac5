"""The shipped tokenizer: reads back what it wrote, and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers", reason="comes with the cpu or cuda extra")
SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="comes with the cpu or cuda extra")
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


# hypothesis runs one fixture value through many examples; a module constant says so plainly.
FOLDER = Path(__file__).resolve().parents[2] / "src" / "hexgen2" / "assets" / "tiny-llama"
RAW = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_unchanged(text: str) -> None:
    ids = RAW.encode(text, add_special_tokens=False).ids
    # A text may spell a special token; those are left out on decoding by design.
    if not any(token in text for token in SPECIAL):
        assert RAW.decode(ids) == text


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=50, deadline=None)
def test_ids_of_different_texts_differ(one: str, other: str) -> None:
    same_ids = RAW.encode(one).ids == RAW.encode(other).ids
    assert same_ids == (one == other)


def test_a_completion_prompt_begins_with_bos(chat: Any) -> None:
    assert chat("Once upon a time")["input_ids"][0] == chat.bos_token_id


def test_plain_english_is_short_in_tokens(chat: Any) -> None:
    text = "The model reads the whole prompt at once and produces the first token."
    assert len(chat(text)["input_ids"]) <= 20


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_are_one_id_each(chat: Any, token: str) -> None:
    assert len(chat.encode(token, add_special_tokens=False)) == 1


def test_the_chat_template_renders_all_roles(chat: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help you today?"},
        {"role": "user", "content": "What is TTFT?"},
    ]
    rendered = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<s><|system|>Be brief.</s><|user|>Hello</s>"
        "<|assistant|>Hello! How can I help you today?</s><|user|>What is TTFT?</s><|assistant|>"
    )
    closed = chat.apply_chat_template(messages, tokenize=False)
    assert rendered == closed + "<|assistant|>"


def test_the_chat_template_gives_the_tokens_of_its_text(chat: Any) -> None:
    messages = [{"role": "user", "content": "What is 7 plus 5?"}]
    text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = chat.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    ids = encoded["input_ids"] if hasattr(encoded, "keys") else encoded
    assert list(ids) == chat.encode(text, add_special_tokens=False)
    assert ids[0] == chat.bos_token_id
    assert ids[-1] == chat.convert_tokens_to_ids("<|assistant|>")


def test_an_unknown_role_is_refused(chat: Any) -> None:
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        chat.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
