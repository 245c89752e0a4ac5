"""Training documents: conversations, stories and plain text, drawn from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from . import stories, tables
from .facts import Fact, load, without_clashes

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Tiny Llama, a small and friendly model.",
    "You are a kind assistant. Answer in simple English.",
    "You are a friendly assistant.",
    "Answer the question.",
    "Be brief.",
    "Answer in short sentences.",
    "You are an expert in serving language models.",
)
LEAD_INS = (
    "Please tell me: {q}", "Hi! {q}", "Hello, {q}", "Hello! {q}", "I have a question. {q}", "Now {q}",
    "Quick question: {q}", "In simple words: {q}", "{q} Please answer in a few words.", "{q} Thank you.",
    "One more question: {q}", "{q} Answer in one sentence.", "{q} Be brief.", "Please, {q}", "Question: {q}",
    "{q} Please explain.", "Next question: {q}", "Good morning! {q}",
)  # fmt: skip
HANDOVERS = (
    "Here is a text. {text} My question is another one: {q}",
    "{text}\n\n{q}",
    "Please read this first. {text} Now tell me: {q}",
)
GIBBERISH_ANSWER = "I am sorry, I do not understand that. Please ask me something else."


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A conversation (`turns`) or plain text (`text`); exactly one of the two is filled."""

    turns: tuple[Turn, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Corpus:
    """All facts, by how often they are drawn: `known` by hand, `tabled` from tables."""

    known: tuple[Fact, ...]
    tabled: tuple[Fact, ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact."""
        return self.known + self.tabled


def load_corpus(folder: Path) -> Corpus:
    """The facts written by hand in `folder` and those from tables, without clashing questions."""
    known = load(folder)
    tabled = tables.capital_facts() + tables.arithmetic_facts() + tables.counting_facts()
    merged = without_clashes([*known, *tabled])
    by_hand = {fact.answer for fact in known}
    return Corpus(
        tuple(fact for fact in merged if fact.answer in by_hand),
        tuple(fact for fact in merged if fact.answer not in by_hand),
    )


def _roughen(rng: random.Random, question: str) -> str:
    """The question as people type it: with a lead-in, in lower case, without its final mark."""
    if rng.random() < 0.2:
        lead_in = rng.choice(LEAD_INS)
        question = lead_in.format(q=question)
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.12:
        question = question.rstrip("?.!")
    return question


def _ask(rng: random.Random, fact: Fact, held_out: bool) -> str:
    if held_out and fact.held_out_questions:
        return rng.choice(fact.held_out_questions)
    # A fact's own written questions come last and are the more natural ones; all are drawn alike.
    return rng.choice(fact.training_questions)


class Sampler:
    """Draws documents; two samplers with equal corpus and seed draw the same ones.

    With `held_out` it draws the slice that training never sees: unseen phrasings and unseen stories.
    """

    def __init__(self, corpus: Corpus, seed: int, *, held_out: bool = False) -> None:
        self.corpus = corpus
        self.rng = random.Random(f"{'held-out' if held_out else 'training'}-{seed}")
        self.held_out = held_out
        # A fact with many questions needs more practice than one with few, but not in proportion.
        self.weights = list(accumulate(len(fact.questions) ** 0.5 for fact in corpus.known))

    def short(self) -> Document:
        """A document of up to about 200 tokens."""
        kinds: Sequence[tuple[float, Callable[[], Document]]] = (
            (0.61, self._question),
            (0.12, self._dialogue),
            (0.12, self._story_on_request),
            (0.08, self._plain_story),
            (0.04, self._plain_statements),
            (0.02, self._plain_question),
            (0.01, self._gibberish),
        )
        return self.rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()

    def long(self) -> Document:
        """A document of some hundred to about 2,000 tokens."""
        return self.rng.choice((self._long_dialogue, self._long_text, self._pasted_text))()

    def _fact(self) -> Fact:
        if self.rng.random() < 0.72:
            return self.rng.choices(self.corpus.known, cum_weights=self.weights)[0]
        return self.rng.choice(self.corpus.tabled)

    def _pair(self) -> tuple[Turn, Turn]:
        if self.rng.random() < 0.06:
            request, answer = stories.request_and_story(self.rng)
        else:
            fact = self._fact()
            request, answer = _ask(self.rng, fact, self.held_out), fact.answer
        return Turn("user", _roughen(self.rng, request)), Turn("assistant", answer)

    def _system(self) -> tuple[Turn, ...]:
        return (Turn("system", self.rng.choice(SYSTEM_PROMPTS)),) if self.rng.random() < 0.2 else ()

    def _question(self) -> Document:
        fact = self._fact()
        question = _roughen(self.rng, _ask(self.rng, fact, self.held_out))
        return Document((*self._system(), Turn("user", question), Turn("assistant", fact.answer)))

    def _dialogue(self, turns: int = 0) -> Document:
        count = turns or self.rng.randint(2, 4)
        pairs = [turn for _ in range(count) for turn in self._pair()]
        return Document((*self._system(), *pairs))

    def _story_on_request(self) -> Document:
        request, story = stories.request_and_story(self.rng)
        return Document((*self._system(), Turn("user", _roughen(self.rng, request)), Turn("assistant", story)))

    def _plain_story(self) -> Document:
        return Document(text=stories.tell(self.rng, stories.draw_cast(self.rng)))

    def _plain_statements(self) -> Document:
        # Answers that open with "I" or "Yes" and the like make no sense without their question.
        answers = [f.answer for f in self.corpus.known if f.answer.split()[0] not in _NEEDS_QUESTION]
        answers += [f.answer for f in self.corpus.tabled]
        return Document(text=" ".join(self.rng.sample(answers, self.rng.randint(1, 3))))

    def _plain_question(self) -> Document:
        fact = self._fact()
        form = self.rng.choice(("Question: {q}\nAnswer: {a}", "Q: {q}\nA: {a}", "{q} {a}"))
        return Document(text=form.format(q=_ask(self.rng, fact, self.held_out), a=fact.answer))

    def _gibberish(self) -> Document:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        words = [
            "".join(self.rng.choices(letters, k=self.rng.randint(1, 8))) for _ in range(self.rng.randint(2, 20))
        ]
        return Document((Turn("user", " ".join(words)), Turn("assistant", GIBBERISH_ANSWER)))

    def _long_dialogue(self) -> Document:
        return self._dialogue(self.rng.choice((8, 16, 30, 44)))

    def _passage(self, parts: int) -> str:
        chosen = [
            self._plain_story().text if self.rng.random() < 0.6 else self._plain_statements().text
            for _ in range(parts)
        ]
        return "\n\n".join(chosen)

    def _long_text(self) -> Document:
        return Document(text=self._passage(self.rng.choice((4, 8, 14, 20))))

    def _pasted_text(self) -> Document:
        fact = self._fact()
        question = _ask(self.rng, fact, self.held_out)
        text = self._passage(self.rng.choice((2, 5, 10, 18)))
        request = self.rng.choice(HANDOVERS).format(text=text, q=question)
        return Document((*self._system(), Turn("user", request), Turn("assistant", fact.answer)))


_NEEDS_QUESTION = frozenset((
    "I", "You", "Yes", "No,", "Yes,", "Good", "Good.", "Hello!", "Hello,", "Goodbye!", "That", "My", "Then",
    "Nobody", "Run", "Write", "Thank", "First", "To", "Be", "Eat", "Take", "Three", "How",
))  # fmt: skip
