"""Greedy answers of a model in a folder, and which of them are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .facts import Fact

_BATCH = 32


@dataclass(frozen=True)
class Answer:
    """Text that a model wrote; `ended` says whether it stopped by itself within the limit."""

    text: str
    ended: bool


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int = 160
) -> list[Answer]:
    """Greedy continuations of `texts`, which must already hold the special tokens they need."""
    answers: list[Answer] = []
    for first in range(0, len(texts), _BATCH):
        encoded = tokenizer(
            list(texts[first : first + _BATCH]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
        )
        for row in output[:, encoded["input_ids"].shape[1] :]:
            ended = bool((row == tokenizer.eos_token_id).any())
            answers.append(Answer(tokenizer.decode(row, skip_special_tokens=True), ended))
    return answers


def reply(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], limit: int = 160
) -> list[Answer]:
    """Greedy answers to single questions, each asked in a chat of its own."""
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        for question in questions
    ]
    return complete(model, tokenizer, prompts, limit)


def wrong_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, Fact]]
) -> list[tuple[str, str]]:
    """The (question, given answer) pairs whose greedy answer is not exactly the fact's answer, ended."""
    given = reply(model, tokenizer, [question for question, _ in asked], limit=80)
    return [
        (question, answer.text)
        for (question, fact), answer in zip(asked, given, strict=True)
        if not answer.ended or answer.text != fact.answer
    ]
