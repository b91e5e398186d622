"""Many-shot classification with arbitrary labels, and tables."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ...library import Library
from ..readings import Ask, Draft
from . import filler
from .words import numbers, things, words

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
    """A table of five things and a number of each, in one of three formats; rows are asked."""
    count = 5
    column = rng.choice(("weight", "price", "stock"))
    names, cells = things(rng, library.split, count), numbers(rng, 4, count)
    head, row, end = rng.choice(
        (
            (["| name | {column} |", "|---|---|"], "| {name} |", " |"),
            (["name, {column}"], "{name},", ""),
            (["The {column} of each item:"], "{name}:", ""),
        )
    )
    lines = [line.format(column=column) for line in head]
    first = len(lines)
    lines += [f"{row.format(name=n)} {c}{end}" for n, c in zip(names, cells, strict=True)]
    asks = tuple(
        Ask(
            f"Which {column} does the table give for the {names[i]}? Repeat its row.",
            row.format(name=names[i]),
            cells[i],
            first + i,
        )
        for i in rng.sample(range(count), 4)
    )
    intro = "The following text contains a table. I will ask you about it afterwards."
    return Draft(intro, tuple(lines), asks, filler.prose(rng, library), together=True)
