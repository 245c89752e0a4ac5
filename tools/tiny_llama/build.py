#!/usr/bin/env python3
"""Build or check the tiny Llama that this repository ships.

    python tools/tiny_llama/build.py                 build src/hexgen2/assets/tiny-llama anew
    python tools/tiny_llama/build.py --check         measure the shipped one and ask it a few questions

Needs torch, transformers, tokenizers and safetensors; all of them come with the project's `cpu` extra.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

# One thread: the sums of a training step then always run in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from recipe import answers, export, tokenizer, train
from recipe.documents import Corpus, Sampler, load_corpus
from recipe.facts import Fact
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent.parent / "src" / "hexgen2" / "assets" / "tiny-llama"

SHOWN = (
    "What is HexGen-2?",
    "What is prefill?",
    "What is a KV cache?",
    "What is the difference between prefill and decode?",
    "What is the capital of France?",
    "What is 7 plus 5?",
    "Why is the sky blue?",
    "Tell me a story about a fox.",
)
STARTS = ("Once upon a time", "A KV cache", "One sunny morning, a little bear")


def tokenizer_texts(corpus: Corpus, seed: int) -> list[str]:
    """The text that the tokenizer is trained on: a sample of the training documents."""
    sampler = Sampler(corpus, seed)
    texts: list[str] = []
    for _ in range(12_000):
        document = sampler.short()
        texts += [document.text] if document.text else [turn.content for turn in document.turns]
    return texts


def questions(corpus: Corpus, *, held_out: bool) -> list[tuple[str, Fact]]:
    """One question for each fact written by hand and for every eighth of the tables."""
    chosen = [*corpus.known, *corpus.tabled[::8]]
    if held_out:
        return [(f.held_out_questions[0], f) for f in chosen if f.held_out_questions]
    return [(f.training_questions[0], f) for f in chosen]


def build(folder: Path, schedule: train.Schedule) -> None:
    """Train and write the model to `folder`."""
    corpus = load_corpus(HERE / "corpus")
    made = tokenizer.train(tokenizer_texts(corpus, schedule.seed), train.MODEL["vocab_size"])
    print(f"{len(corpus.known)} facts by hand, {len(corpus.tabled)} from tables", file=sys.stderr)
    result = train.fit(corpus, made, schedule)
    export.write_folder(folder, result, made)
    figures = measure(folder, corpus)
    export.write_card(folder, result, schedule, len(corpus.facts), figures)


def measure(folder: Path, corpus: Corpus) -> dict[str, str]:
    """Held-out loss and the share of right greedy answers of the model in `folder`, in float32; printed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    chat = AutoTokenizer.from_pretrained(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    figures: dict[str, str] = {}
    for label, long in (("held_out_loss", False), ("long_loss", True)):
        loss = train.held_out_loss(model, corpus, raw, long=long)
        figures[label] = f"{loss:.3f}"
        print(f"{label} {loss:.4f} nats a token")
    for label, held_out in (("known", False), ("unseen", True)):
        asked = questions(corpus, held_out=held_out)
        wrong = answers.wrong_answers(model, chat, asked)
        figures[f"{label}_right"] = f"{len(asked) - len(wrong)} of {len(asked)}"
        print(f"{label} phrasings answered word for word: {figures[f'{label}_right']}")
        for question, text in wrong[:20]:
            print(f"    {question} -> {text}")
    for question, given in zip(SHOWN, answers.reply(model, chat, SHOWN), strict=True):
        print(f"\n> {question}\n{given.text}{'' if given.ended else ' [no end]'}")
    opened = [f"{tokenizer.BOS}{start}" for start in STARTS]
    for start, given in zip(STARTS, answers.complete(model, chat, opened), strict=True):
        print(f"\n{start}|{given.text}{'' if given.ended else ' [no end]'}")
    return figures


def main() -> int:
    """Read the command line and build or check."""
    parser = argparse.ArgumentParser(description="Build or check the shipped tiny Llama.")
    parser.add_argument("--check", action="store_true", help="measure the model in the folder, train nothing")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where the model is or goes")
    parser.add_argument("--steps", type=int, default=train.Schedule.steps, help="training steps")
    parser.add_argument("--seed", type=int, default=train.Schedule.seed, help="seed of weights and documents")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    if arguments.check:
        measure(arguments.folder, load_corpus(HERE / "corpus"))
    else:
        build(arguments.folder, train.Schedule(steps=arguments.steps, seed=arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
