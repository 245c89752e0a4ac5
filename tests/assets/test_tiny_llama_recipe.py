"""The recipe's corpus: well formed, one answer to a question, and the same for the same seed."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe import facts, stories, tables
from recipe.documents import Corpus, Sampler, load_corpus

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "tiny_llama" / "corpus"
CORPUS = load_corpus(FOLDER)


def test_no_question_has_two_answers() -> None:
    assert facts.clashes(facts.load(FOLDER)) == []
    assert facts.clashes(CORPUS.facts) == []


def test_there_is_a_good_number_of_facts() -> None:
    assert len(CORPUS.known) >= 200
    assert len(CORPUS.tabled) >= 400


def test_answers_are_ascii_sentences() -> None:
    for fact in CORPUS.facts:
        assert fact.answer.isascii(), fact.answer
        assert fact.answer[-1] in ".!?", fact.answer
        assert len(fact.answer.split()) <= 60, fact.answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q: What?\nA: This.\nA: That.", "exactly one answer"),
        ("A: This.", "needs questions"),
        ("Q: What?\nB: This.", "unknown line"),
    ],
)
def test_a_bad_block_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        facts.parse(text, "test")


def test_a_term_yields_questions_in_all_its_forms() -> None:
    (fact,) = facts.parse("T: GPU | a GPU | GPUs\nA: A GPU is a chip.", "test")
    assert {"What is a GPU?", "Explain GPU.", "What are GPUs?", "A GPU is a chip."} & set(fact.questions) == {
        "What is a GPU?",
        "Explain GPU.",
        "What are GPUs?",
    }


def test_held_out_questions_are_never_in_training() -> None:
    unseen = {facts.normalised(q) for fact in CORPUS.facts for q in fact.held_out_questions}
    trained = {facts.normalised(q) for fact in CORPUS.facts for q in fact.training_questions}
    assert len(unseen) >= 200
    assert not unseen & trained


@pytest.mark.parametrize("fact", random.Random(0).sample(tables.arithmetic_facts(), 40), ids=lambda f: f.answer)
def test_sums_are_right(fact: facts.Fact) -> None:
    match = re.fullmatch(r"(\d+) (plus|minus|times) (\d+) is (\d+)\.", fact.answer)
    assert match
    a, word, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
    assert {"plus": a + b, "minus": a - b, "times": a * b}[word] == result
    assert all(str(a) in q or tables.NUMBERS[a] in q for q in fact.questions)


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_stories_are_whole(seed: int) -> None:
    rng = random.Random(seed)
    cast = stories.draw_cast(rng)
    story = stories.tell(rng, cast)
    assert cast.name in story
    assert cast.kind in story
    assert cast.name != cast.friend
    assert not re.search(r"[{}]", story)
    assert not re.search(r"\ba [aeiou]", story), story
    assert 50 <= len(story.split()) <= 160


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_same_seed_draws_the_same_documents(seed: int) -> None:
    def draw(corpus: Corpus) -> list[object]:
        sampler = Sampler(corpus, seed)
        return [*islice(iter(sampler.short, None), 30), sampler.long()]

    assert draw(CORPUS) == draw(load_corpus(FOLDER))
