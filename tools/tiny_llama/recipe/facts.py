"""Facts: several questions, one answer. Parsed from corpus/*.txt and spread into paraphrases.

A corpus file holds blocks parted by blank lines; `#` starts a comment line:

    T: KV cache | a KV cache | KV caches      bare form | with article | plural (optional)
    Q: What does a KV cache do?               any number of further questions
    A: A KV cache holds the keys and values of all tokens seen so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_BARE = (
    "What is {bare}?",
    "What does {bare} mean?",
    "Explain {bare}.",
    "Explain {bare} to me.",
    "Explain {bare} in simple words.",
    "Explain {bare} in one sentence.",
    "Please explain {bare}.",
    "Define {bare}.",
    "Tell me about {bare}.",
    "{bare}?",
    "{bare}",
    "What do you know about {bare}?",
    "I want to learn about {bare}.",
)
_ARTICLE = (
    "What is {art}?",
    "What's {art}?",
    "What exactly is {art}?",
    "Explain what {art} is.",
    "Can you explain {art}?",
    "Can you tell me what {art} is?",
    "Do you know what {art} is?",
    "Describe {art}.",
    "Tell me what {art} is.",
    "I do not know what {art} is.",
)
_PLURAL = (
    "What are {plural}?",
    "Tell me about {plural}.",
    "Explain {plural}.",
    "Describe {plural}.",
    "What do you know about {plural}?",
    "Can you explain {plural}?",
)

HELD_OUT_ONE_IN = 16
"""One question in this many is kept out of training, to measure unseen phrasings."""


@dataclass(frozen=True)
class Fact:
    """One answer and every question that leads to it."""

    subject: str
    questions: tuple[str, ...]
    answer: str

    @property
    def training_questions(self) -> tuple[str, ...]:
        """The questions that training may see; never empty."""
        kept = tuple(q for q in self.questions if not is_held_out(q))
        return kept or self.questions

    @property
    def held_out_questions(self) -> tuple[str, ...]:
        """The questions that training never sees; empty for facts with few phrasings."""
        if len(self.questions) < 6:
            return ()
        return tuple(q for q in self.questions if is_held_out(q))


def is_held_out(question: str) -> bool:
    """Whether `question` belongs to the held-out slice, by a hash of its words (stable across runs)."""
    digest = hashlib.sha256(normalised(question).encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def normalised(question: str) -> str:
    """A question without case and final punctuation: what makes two questions the same one."""
    return question.lower().strip().rstrip("?.!").strip()


def capitalised(text: str) -> str:
    """`text` with a capital first letter; the rest stays ("a GPU" becomes "A GPU")."""
    return text[:1].upper() + text[1:]


def paraphrases(term: str) -> list[str]:
    """The standard questions about a `T:` line's term."""
    forms = [form.strip() for form in term.split("|")]
    bare, article = forms[0], forms[1] if len(forms) > 1 else forms[0]
    questions = [t.format(bare=bare) for t in _BARE] + [t.format(art=article) for t in _ARTICLE]
    if len(forms) > 2:
        questions += [t.format(plural=forms[2]) for t in _PLURAL]
    return [capitalised(q) for q in questions]


def parse(text: str, subject: str) -> list[Fact]:
    """Facts of one corpus file. Raises ValueError naming the block that is not well formed."""
    facts: list[Fact] = []
    for number, block in enumerate(text.split("\n\n"), start=1):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        questions: list[str] = []
        answers: list[str] = []
        for line in lines:
            tag, _, rest = line.partition(":")
            if tag == "T":
                questions += paraphrases(rest.strip())
            elif tag == "Q":
                questions.append(rest.strip())
            elif tag == "A":
                answers.append(rest.strip())
            else:
                raise ValueError(f"{subject}, block {number}: unknown line {line!r}; use T:, Q: or A:")
        if not questions or len(answers) != 1:
            raise ValueError(f"{subject}, block {number}: needs questions and exactly one answer: {lines[0]!r}")
        facts.append(Fact(subject, tuple(dict.fromkeys(questions)), answers[0]))
    return facts


def load(folder: Path) -> list[Fact]:
    """All facts of `folder`/*.txt in the order of the file names."""
    return [fact for path in sorted(folder.glob("*.txt")) for fact in parse(path.read_text(), path.stem)]


def without_clashes(facts: Iterable[Fact]) -> list[Fact]:
    """Drop generated questions that an earlier fact already owns, so that no question has two answers."""
    owner: dict[str, str] = {}
    result: list[Fact] = []
    for fact in facts:
        mine = [q for q in fact.questions if owner.setdefault(normalised(q), fact.answer) == fact.answer]
        if mine:
            result.append(Fact(fact.subject, tuple(mine), fact.answer))
    return result


def clashes(facts: Sequence[Fact]) -> list[str]:
    """Questions that lead to more than one answer."""
    answers: dict[str, set[str]] = {}
    for fact in facts:
        for question in fact.questions:
            answers.setdefault(normalised(question), set()).add(fact.answer)
    return sorted(question for question, found in answers.items() if len(found) > 1)
