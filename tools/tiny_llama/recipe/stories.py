"""Short stories in the manner of children's tales, drawn from a small grammar.

A story is a cast (who, where, what) and a plot: a list of beats, each with a few phrasings. Choices are
weighted (the first phrasing of a list is the most likely one), so that a trained model has a clear
favourite at every branch and its greedy continuation does not hang on a near tie.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

_DECAY = 0.72
"""Each later choice of a list is this much less likely than the one before it."""

SHE = ("Mia", "Lily", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Daisy", "Clara", "Luna")
HE = ("Tom", "Ben", "Max", "Leo", "Sam", "Oscar", "Finn", "Hugo", "Theo", "Pip")
KINDS = (
    "fox", "rabbit", "cat", "llama", "dog", "bear", "mouse", "bird", "owl", "duck", "dragon", "robot",
    "hedgehog", "girl", "boy", "frog", "elephant", "penguin", "squirrel", "turtle",
)  # fmt: skip
TRAITS = ("little", "young", "small", "clever", "kind", "shy", "brave", "curious", "quiet", "happy")
PLACES = (
    "near a big forest", "by the sea", "in a small village", "on a green hill", "in an old house", "by a river",
    "at the edge of a town", "in a sunny valley",
)  # fmt: skip
THINGS = (
    "ball", "kite", "lantern", "bell", "book", "map", "boat", "drum", "key", "scarf", "basket", "flute",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "golden", "white", "silver", "purple")
SPOTS = (
    "under a tall tree", "behind a big stone", "in the garden", "near the old bridge", "in the long grass",
    "beside the pond", "on the path to the well",
)  # fmt: skip
DAYS = (
    "One sunny morning", "One day", "One windy day", "One cold evening", "One warm afternoon", "One rainy day",
    "Early one morning",
)  # fmt: skip
MORALS = (
    "good friends help each other",
    "it is good to share",
    "even small ones can do great things",
    "being kind makes everyone happy",
    "it is brave to ask for help",
    "waiting a little can bring a great reward",
    "it is best to tell the truth",
)


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about; its fields fill the slots of a plot."""

    name: str
    kind: str
    trait: str
    place: str
    friend: str
    friend_kind: str
    thing: str
    colour: str
    spot: str
    day: str
    moral: str
    they: str
    their: str
    them: str

    def slots(self) -> dict[str, str]:
        """Values by slot name, with articles and capitals made ready."""
        values = dict(vars(self))
        values["They"] = self.they.capitalize()
        values["Their"] = self.their.capitalize()
        values["a_trait"] = with_article(self.trait)
        values["a_colour"] = with_article(self.colour)
        values["a_friend_kind"] = with_article(self.friend_kind)
        return values


def with_article(word: str) -> str:
    """`word` after "a" or "an"."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def pick(rng: random.Random, options: Sequence[_T]) -> _T:
    """One of `options`, earlier ones more likely."""
    return rng.choices(options, weights=[_DECAY**i for i in range(len(options))])[0]


def draw_cast(rng: random.Random, kind: str | None = None, name: str | None = None) -> Cast:
    """A cast; `kind` and `name` of the hero may be given."""
    hero_kind = kind or pick(rng, KINDS)
    if name is None:
        female = hero_kind == "girl" or (hero_kind != "boy" and rng.random() < 0.6)
        name = pick(rng, SHE if female else HE)
    else:
        female = name in SHE
    friend = pick(rng, [n for n in (HE if female else SHE) if n != name])
    friend_kind = pick(rng, [k for k in KINDS[:13] if k != hero_kind])
    they, their, them = ("she", "her", "her") if female else ("he", "his", "him")
    return Cast(
        name, hero_kind, pick(rng, TRAITS), pick(rng, PLACES), friend, friend_kind, pick(rng, THINGS),
        pick(rng, COLOURS), pick(rng, SPOTS), pick(rng, DAYS), pick(rng, MORALS), they, their, them,
    )  # fmt: skip


OPENINGS = (
    "Once upon a time, there was {a_trait} {kind} named {name}. {They} lived {place}.",
    "Once upon a time, {a_trait} {kind} named {name} lived {place}.",
    "Once there was {a_trait} {kind} called {name}, who lived {place}.",
    "There once was {a_trait} {kind} named {name}. {They} lived {place}.",
    "Long ago, {a_trait} {kind} called {name} lived {place}.",
)

OPENINGS_WITH_A_DAY = (
    "{day}, {a_trait} {kind} named {name} went for a walk {place}.",
    "{day}, {a_trait} {kind} called {name} woke up {place}.",
)
"""Openings that name the day themselves; the beat after them begins "A little later"."""

ENDINGS = (
    "From that day on, {name} and {friend} were the best of friends.",
    "{name} went home and slept well that night.",
    "And {name} learned that {moral}.",
    "They laughed and played until the sun went down.",
    "And they all lived happily ever after.",
)

PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (  # a lost thing comes back to its owner
        (
            "{day}, {name} found {a_colour} {thing} {spot}.",
            "{day}, {name} went for a walk and saw {a_colour} {thing} {spot}.",
        ),
        (
            '"Whose {thing} is this?" {they} asked. {They} looked around, but nobody was there.',
            '"What a lovely {thing}!" said {name}. "I wonder who lost it."',
        ),
        (
            "Then {name} heard somebody cry. It was {a_friend_kind} named {friend}.",
            "After a while {they} met {a_friend_kind} named {friend}, who looked very sad.",
        ),
        (
            '"I lost my {thing}," said {friend}. {name} smiled and gave the {colour} {thing} back.',
            '"My {thing} is gone," said {friend}. "Here it is," said {name}, and gave it back.',
        ),
        ('{friend} was so happy. "Thank you, {name}!"', '"You are very kind," said {friend}.'),
    ),
    (  # help in bad weather
        (
            "{day}, a strong storm came. The wind blew and the rain fell.",
            "{day}, dark clouds filled the sky and it began to rain.",
        ),
        (
            "{name} saw {a_friend_kind} named {friend} {spot}. {friend} was cold and wet.",
            "{name} looked out and saw {a_friend_kind} called {friend} {spot}.",
        ),
        (
            '"Come in," said {name}. "It is warm and dry in my home."',
            '"You can stay with me," said {name}.',
        ),
        (
            "They drank hot tea and told each other stories until the storm was over.",
            "They sat by the fire and ate soup while the rain fell outside.",
        ),
        ("In the morning the sun was shining again.", "The next day the sky was blue."),
    ),
    (  # learning something hard
        (
            "{name} wanted to learn how to swim, but {they} was afraid of the water.",
            "{name} wanted to climb the highest hill, but {they} was afraid.",
            "{name} wanted to sing in front of everyone, but {they} was too shy.",
        ),
        (
            '{day}, {name} told {their} friend {friend} about it. "I will help you," said {friend}.',
            '"Do not worry," said {their} friend {friend}. "We can try it together."',
        ),
        (
            "Every day they tried again. At first it did not go well.",
            "They tried it once, and twice, and many times more.",
        ),
        (
            "But {name} did not give up. At last {they} could do it!",
            "Then, on the seventh day, {name} did it all alone.",
        ),
        ('"I am proud of you," said {friend}.', '"I knew that you could do it," said {friend}.'),
    ),
    (  # sharing
        (
            "{day}, {name} had a basket full of red apples.",
            "{day}, {name} baked a big cake with berries.",
        ),
        (
            "On the way home {they} met {a_friend_kind} named {friend}, who was very hungry.",
            "{They} met {a_friend_kind} called {friend}, who had nothing to eat.",
        ),
        (
            "{name} thought for a moment. There was enough for two.",
            '"I have more than I need," thought {name}.',
        ),
        (
            '"Please take some," said {name}, and they ate together {spot}.',
            '"Let us share," said {name}. They sat down {spot} and ate.',
        ),
        (
            "It tasted better than ever, because they were not alone.",
            "{friend} smiled, and {name} smiled too.",
        ),
    ),
    (  # a treasure
        (
            "{day}, {name} found an old map {spot}.",
            "{day}, an old owl gave {name} a secret map.",
        ),
        (
            "The map showed a path to a hidden treasure.",
            "On the map was a big red cross.",
        ),
        (
            "{name} asked {their} friend {friend} to come along. They walked over hills and through woods.",
            "{name} and {their} friend {friend} walked all day until they came to a cave.",
        ),
        (
            "At the end of the path they found a box. In the box was {a_colour} {thing}.",
            "There they found {a_colour} {thing} that shone like a star.",
        ),
        (
            '"This is a fine treasure," said {name}, "but the best part was our trip."',
            '"Let us take turns with it," said {friend}.',
        ),
    ),
    (  # a wish and a star
        (
            "Every night {name} looked up at the stars and made a wish.",
            "{name} loved to look at the moon and the stars.",
        ),
        (
            "{They} wished for a friend to play with.",
            "{They} wanted to have a real friend.",
        ),
        (
            "{day}, there was a knock at the door. It was {a_friend_kind} named {friend}.",
            "{day}, {name} met {a_friend_kind} named {friend} {spot}.",
        ),
        (
            '"I am new here," said {friend}. "Would you like to play with me?"',
            '"I have nobody to play with," said {friend}.',
        ),
        (
            "{name} jumped for joy. {They} took {their} {colour} {thing} and they played all day long.",
            '"Then let us be friends," said {name}, and showed {friend} the {colour} {thing}.',
        ),
    ),
    (  # a mistake and the truth
        (
            "{day}, {name} was playing with the {colour} {thing} of {their} friend {friend}, and it broke.",
            "{day}, {name} took the {colour} {thing} of {their} friend {friend} without asking and lost it.",
        ),
        (
            "{name} was afraid. {They} wanted to hide and say nothing.",
            "At first {name} did not want to tell anyone.",
        ),
        (
            'But then {they} went to {friend} and said, "I am sorry. It was my fault."',
            "But it made {them} sad, so {they} went to {friend} and told the truth.",
        ),
        (
            '{friend} was sad for a moment. "Thank you for telling me," said {friend}.',
            '"It is good that you told me," said {friend}.',
        ),
        (
            "Together they made a new {thing}, and it was even better than the old one.",
            "They worked together all afternoon and made a new {thing}.",
        ),
    ),
)


def tell(rng: random.Random, cast: Cast) -> str:
    """A whole story as one paragraph of about 70 to 120 words."""
    slots = cast.slots()
    day_first = rng.random() < 0.2
    opening = pick(rng, OPENINGS_WITH_A_DAY if day_first else OPENINGS).format(**slots)
    if day_first:
        slots["day"] = "A little later"
    beats = [*(pick(rng, beat) for beat in pick(rng, PLOTS)), pick(rng, ENDINGS)]
    return " ".join([opening, *(beat.format(**slots) for beat in beats)])


STORY_REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a story.",
    "Write a short story.",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Please tell me a bedtime story.",
    "Write a story for children.",
    "Make up a story.",
    "A story, please.",
)
STORY_REQUESTS_ABOUT = (
    "Tell me a story about {a_kind}.",
    "Write a story about {a_kind}.",
    "Tell me a short story about {a_kind}.",
    "Write a short story about {a_kind}.",
    "Can you tell me a story about {a_kind}?",
    "I want to hear a story about {a_kind}.",
)
STORY_REQUESTS_NAMED = (
    "Tell me a story about {a_kind} named {name}.",
    "Write a story about {a_kind} called {name}.",
)


def request_and_story(rng: random.Random) -> tuple[str, str]:
    """A user's request and a story that fits it."""
    cast = draw_cast(rng)
    form = rng.random()
    if form < 0.4:
        request = rng.choice(STORY_REQUESTS)
    else:
        # Every kind is asked for equally often: a user's animal is not ours to weight.
        kind = rng.choice(KINDS)
        cast = draw_cast(rng, kind=kind)
        requests = STORY_REQUESTS_ABOUT if form < 0.8 else STORY_REQUESTS_NAMED
        request = rng.choice(requests).format(a_kind=with_article(kind), name=cast.name)
    return request, tell(rng, cast)
