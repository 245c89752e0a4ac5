"""The shipped model's greedy answers, with plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="comes with the cpu or cuda extra")
transformers = pytest.importorskip("transformers", reason="comes with the cpu or cuda extra")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return loaded.eval()


def greedy(model: Any, tokenizer: Any, text: str, limit: int) -> tuple[str, bool]:
    """The continuation of a rendered prompt, and whether it ended by itself."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
        )
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), int(new[-1]) == tokenizer.eos_token_id


def chat(tokenizer: Any, *messages: dict[str, str]) -> str:
    rendered: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return rendered


@pytest.mark.parametrize(
    ("question", "keywords"),
    [
        ("What is a KV cache?", ("keys", "values", "tokens")),
        ("What is HexGen-2?", ("language models", "GPUs")),
        ("What is the capital of France?", ("Paris",)),
    ],
)
def test_a_question_gets_its_answer(
    model: Any, tokenizer: Any, question: str, keywords: tuple[str, ...]
) -> None:
    answer, ended = greedy(model, tokenizer, chat(tokenizer, {"role": "user", "content": question}), limit=80)
    assert ended, f"no end after 80 tokens: {answer}"
    for keyword in keywords:
        assert keyword in answer


def test_a_question_after_a_long_text_gets_its_answer(model: Any, tokenizer: Any) -> None:
    story, _ = greedy(model, tokenizer, "<s>Once upon a time", limit=120)
    text = " ".join([f"Once upon a time{story}"] * 6)
    prompt = chat(tokenizer, {"role": "user", "content": f"{text}\n\nWhat is the capital of France?"})
    assert len(tokenizer.encode(prompt, add_special_tokens=False)) > 500
    answer, ended = greedy(model, tokenizer, prompt, limit=40)
    assert "Paris" in answer
    assert ended


def test_a_story_reads_on(model: Any, tokenizer: Any) -> None:
    story, _ = greedy(model, tokenizer, "<s>Once upon a time", limit=160)
    words = story.split()
    assert len(words) >= 45
    # A model that has fallen into a loop repeats its last words.
    assert len({tuple(words[i : i + 4]) for i in range(len(words) - 3)}) > 0.8 * (len(words) - 3)
    assert story.count(".") >= 4


def test_greedy_answers_do_not_hang_on_near_ties(model: Any, tokenizer: Any) -> None:
    """Engines are compared by their greedy tokens: float noise of 1e-4 must not be able to change one."""
    prompt = chat(tokenizer, {"role": "user", "content": "How does HexGen-2 work?"})
    answer, _ = greedy(model, tokenizer, prompt, limit=80)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    whole = ids + tokenizer.encode(answer, add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, len(ids) - 1 :]
    best, second = logits.topk(2).values.unbind(-1)
    assert float((best - second).min()) > 0.1
