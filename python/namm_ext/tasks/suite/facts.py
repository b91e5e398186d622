"""Facts that are stated in some words and asked in others, overwritten facts, conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...library import Library
from ..readings import Ask, Draft
from . import filler
from .words import MONTHS, numbers, people, things, words

_INTRO = "Read the following text carefully. I will ask you about it afterwards."


@dataclass(frozen=True)
class FactFamily:
    """A kind of fact.

    Attributes:
        name: of the family.
        statements: wordings with ``{who}`` and ``{what}``; one is drawn.
        question: with ``{who}``, in other words than any statement.
        prefix: how the answer begins, with ``{who}``.
        values: a list of `words`; ``number``, ``price`` or ``date``, which have no splits.
        about: ``people`` or ``things``.
    """

    name: str
    statements: tuple[str, ...]
    question: str
    prefix: str
    values: str
    about: str = "people"

    def draw(self, rng: random.Random, split: str, count: int) -> list[str]:
        """Different values."""
        if self.values == "number":
            return numbers(rng, 4, count)
        if self.values == "price":
            return numbers(rng, 2, count)
        if self.values == "date":
            return [f"{month} {rng.randrange(1, 29)}" for month in rng.sample(MONTHS, count)]
        return rng.sample(words(self.values, split), count)


FACT_FAMILIES = (
    FactFamily(
        "city",
        (
            "{who} moved to {what} a few years ago and never left.",
            "These days {who} rents a small flat in {what}.",
            "{who} has settled down in {what} for good.",
        ),
        "In which city does {who} live?",
        "{who} lives in the city of",
        "city",
    ),
    FactFamily(
        "job",
        (
            "{who} earns a living as a {what}.",
            "After years of training {who} became a {what}.",
            "{who} was hired as a {what} last spring.",
        ),
        "What is the profession of {who}?",
        "{who} works as a",
        "job",
    ),
    FactFamily(
        "pet",
        (
            "{who} shares the house with an old {what}.",
            "Every morning {who} feeds a {what} before leaving.",
            "{who} takes a {what} along on every walk.",
        ),
        "What kind of animal does {who} have as a pet?",
        "The pet of {who} is a",
        "animal",
    ),
    FactFamily(
        "food",
        (
            "{who} orders {what} whenever it is on the menu.",
            "Nothing makes {who} happier than a plate of {what}.",
            "{who} could eat {what} every day.",
        ),
        "What is the favorite food of {who}?",
        "{who} loves to eat",
        "food",
    ),
    FactFamily(
        "birthday",
        (
            "{who} was born on {what}.",
            "Every year on {what} the family bakes a cake for {who}.",
            "{who} gets presents on {what}.",
        ),
        "When is the birthday of {who}?",
        "The birthday of {who} is",
        "date",
    ),
    FactFamily(
        "color",
        (
            "{who} drives a {what} car.",
            "The {what} car in the driveway belongs to {who}.",
            "The car that {who} bought last year is {what}.",
        ),
        "What color is the car of {who}?",
        "The color of the car of {who} is",
        "color",
    ),
    FactFamily(
        "locker",
        (
            "{who} keeps a coat in the locker that {what} unlocks.",
            "To get into the locker, {who} types {what}.",
            "The locker of {who} stays shut until one enters {what}.",
        ),
        "What is the code of the locker of {who}?",
        "{who} unlocks the locker with the number",
        "number",
    ),
    FactFamily(
        "price",
        (
            "Visitors pay {what} dollars to see the {who}.",
            "A ticket for the {who} sets you back {what} dollars.",
            "The {who} was sold for {what} dollars.",
        ),
        "How much does the {who} cost?",
        "In dollars, the {who} costs",
        "price",
        "things",
    ),
    FactFamily(
        "instrument",
        (
            "{who} practices the {what} every evening.",
            "Neighbors often hear the {what} of {who}.",
            "{who} got a {what} as a present and took lessons.",
        ),
        "Which musical instrument does {who} play?",
        "{who} plays the",
        "instrument",
    ),
)
#: Only in the test split.
HELD_OUT_FAMILY = "instrument"


def paraphrase(rng: random.Random, library: Library) -> Draft:
    """Six facts of different families, asked in other words than they were stated in."""
    return _paraphrases(rng, library, count=6, turns=False)


def multi_turn(rng: random.Random, library: Library) -> Draft:
    """Four facts asked one after the other in a conversation."""
    return _paraphrases(rng, library, count=4, turns=True)


def unseen_family(rng: random.Random, library: Library) -> Draft:
    """Two facts of the family that is never trained on, among two of others; the two are asked."""
    known = [family for family in FACT_FAMILIES if family.name != HELD_OUT_FAMILY]
    unseen = next(family for family in FACT_FAMILIES if family.name == HELD_OUT_FAMILY)
    families = [unseen, *rng.sample(known, 2), unseen]
    return _draft(rng, library, families, turns=False, asked=(unseen,))


def overwritten(rng: random.Random, library: Library) -> Draft:
    """Three things with a number each, two of which change later; the newest ones are asked."""
    items = things(rng, library.split, 3)
    named = [*items, *items[:2]]
    rng.shuffle(named)
    values = numbers(rng, 4, len(named))
    newest = {item: i for i, item in enumerate(named)}
    facts = tuple(
        f"Update: from now on, the access code for the {item} is {value}."
        for item, value in zip(named, values, strict=True)
    )
    asks = tuple(
        Ask(
            f"What is the access code for the {item} according to the latest update?",
            f"According to the latest update, the access code for the {item} is",
            values[newest[item]],
            newest[item],
        )
        for item in items
    )
    return Draft(_INTRO, facts, asks, filler.prose(rng, library))


def _paraphrases(rng: random.Random, library: Library, *, count: int, turns: bool) -> Draft:
    known = [family for family in FACT_FAMILIES if family.name != HELD_OUT_FAMILY]
    return _draft(rng, library, rng.sample(known, count), turns, asked=known)


def _draft(
    rng: random.Random,
    library: Library,
    families: Sequence[FactFamily],
    turns: bool,
    asked: Sequence[FactFamily],
) -> Draft:
    who_of = {
        "people": people(rng, library.split, len(families)),
        "things": things(rng, library.split, len(families)),
    }
    values = {
        family.name: family.draw(rng, library.split, families.count(family)) for family in families
    }
    facts, asks = [], []
    for i, family in enumerate(families):
        who, what = who_of[family.about][i], values[family.name].pop()
        facts.append(rng.choice(family.statements).format(who=who, what=what))
        if family in asked:
            asks.append(
                Ask(family.question.format(who=who), family.prefix.format(who=who), what, i)
            )
    rng.shuffle(asks)
    return Draft(_INTRO, tuple(facts), tuple(asks), filler.prose(rng, library), turns=turns)
