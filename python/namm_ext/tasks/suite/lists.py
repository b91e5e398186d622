"""Many-shot classification with arbitrary labels, and tables."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ...library import Library
from ..readings import Ask, Draft
from . import filler
from .words import numbers, people, words

_CATEGORIES = ("animal", "city", "food", "garment", "instrument", "job", "tool", "vehicle")


def many_shot(rng: random.Random, library: Library) -> Draft:
    """Words of four categories, each with a label that means nothing; asked for new words."""
    categories = rng.sample(_CATEGORIES, 4)
    labels = dict(zip(categories, rng.sample(words("label", library.split), 4), strict=True))
    new: list[tuple[str, str]] = []
    seen: list[tuple[str, str]] = []
    for category in categories:
        known = rng.sample(words(category, library.split), len(words(category, library.split)))
        new += [(word, category) for word in known[:2]]
        seen += [(word, category) for word in known[2:]]

    def examples() -> Iterator[str]:
        while True:
            for word, category in rng.sample(seen, len(seen)):
                yield f"Input: {word.lower()}\nLabel: {labels[category]}"

    rng.shuffle(new)
    asks = tuple(
        Ask(
            "What is the label of the next input? Answer as in the examples.",
            f"Input: {word.lower()}\nLabel:",
            labels[category],
        )
        for word, category in new
    )
    intro = "Learn from the following examples which label belongs to which kind of input."
    return Draft(intro, (), asks, examples(), gap="\n\n")


def table(rng: random.Random, library: Library) -> Draft:
    """A table of twelve people with city, job and number, in one of three formats; cells asked."""
    count = 12
    columns = ("name", "city", "job", "number")
    rows = [
        (name, rng.choice(words("city", library.split)), rng.choice(words("job", library.split)), n)
        for name, n in zip(people(rng, library.split, count), numbers(rng, 3, count), strict=True)
    ]
    style = rng.choice(("markdown", "csv", "lines"))
    if style == "markdown":
        head = ("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))
        lines = [*head, *("| " + " | ".join(row) + " |" for row in rows)]
    elif style == "csv":
        lines = [", ".join(columns), *(", ".join(row) for row in rows)]
    else:
        lines = [
            "; ".join(f"{column}: {cell}" for column, cell in zip(columns, row, strict=True))
            for row in rows
        ]
    first = len(lines) - count
    asks: list[Ask] = []
    for i in rng.sample(range(count), 6):
        column = 1 + len(asks) % 3
        what = columns[column]
        question = f"In the table, what is the {what} of {rows[i][0]}?"
        asks.append(Ask(question, f"The {what} of {rows[i][0]} is", rows[i][column], first + i))
    intro = "The following text contains a table. I will ask you about it afterwards."
    return Draft(intro, tuple(lines), tuple(asks), filler.prose(rng, library), together=True)
