"""Needles in a haystack and variable tracking, as RULER defines them (arXiv 2404.06654).

The wordings, the beginnings of the answers and what varies between the tasks are RULER's: one key
with one value; several keys, of which one is asked; a key with several values; several keys asked
at once; chains of variables. The haystack is prose, facts stand between sentences. Numbers have
five digits. Where RULER counts how many items of a list are named, here each item is a question of
its own, behind the items before it.
"""

from __future__ import annotations

import random

from ...library import Library
from ..readings import Ask, Draft
from . import filler
from .words import numbers, things

_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)


def single(rng: random.Random, library: Library) -> Draft:
    """One key, one value."""
    return _keys(rng, library, 1)


def multi_key(rng: random.Random, library: Library) -> Draft:
    """Eight keys of one value each; each is asked."""
    return _keys(rng, library, 8)


def multi_value(rng: random.Random, library: Library) -> Draft:
    """Two keys of three values each; each value is asked, behind those before it."""
    keys = things(rng, library.split, 2)
    owners = keys * 3
    rng.shuffle(owners)
    values = numbers(rng, 5, len(owners))
    asks = []
    for key in keys:
        mine = [i for i, owner in enumerate(owners) if owner == key]
        asks += _list_asks(key, [(i, values[i]) for i in mine])
    return _needles(rng, library, owners, values, asks)


def multi_query(rng: random.Random, library: Library) -> Draft:
    """Six keys of one value each; three are asked at once, each behind those before it."""
    keys = things(rng, library.split, 6)
    values = numbers(rng, 5, len(keys))
    order = rng.sample(range(6), 6)
    asks = []
    for group in (order[:3], order[3:]):
        named = f"{keys[group[0]]}, {keys[group[1]]}, and {keys[group[2]]}"
        asks += _list_asks(named, [(i, values[i]) for i in group])
    return _needles(rng, library, keys, values, asks)


def variable_tracking(rng: random.Random, library: Library) -> Draft:
    """Two chains of a value and three variables; each variable is asked, behind those before it."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 6:
        name = "".join(rng.sample(letters, 5))
        if name not in names:
            names.append(name)
    values = numbers(rng, 5, 2)
    chains = (names[:3], names[3:])
    lines = [
        [f"VAR {a} = {b if b.isdigit() else f'VAR {b}'}" for a, b in zip(c, [v, *c], strict=False)]
        for c, v in zip(chains, values, strict=True)
    ]
    # The lines of a chain keep their order, the chains mix.
    order = [0] * 3 + [1] * 3
    rng.shuffle(order)
    facts: list[str] = []
    asks: list[Ask] = []
    where: dict[str, int] = {}
    steps = [0, 0]
    for which in order:
        where[chains[which][steps[which]]] = len(facts)
        facts.append(lines[which][steps[which]])
        steps[which] += 1
    for chain, value in zip(chains, values, strict=True):
        for i, name in enumerate(chain):
            prefix = (
                "According to the chain(s) of variable assignment in the text above, 3 variables "
                f"are assigned the value {value}, they are:"
            )
            question = f"Find all variables that are assigned the value {value} in the text above."
            asks.append(Ask(question, " ".join([prefix, *chain[:i]]), name, where[name]))
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    return Draft(intro, tuple(facts), tuple(asks), filler.prose(rng, library))


def _keys(rng: random.Random, library: Library, count: int) -> Draft:
    keys = things(rng, library.split, count)
    values = numbers(rng, 5, count)
    asks = [
        Ask(
            f"What is the special magic number for {key} mentioned in the provided text?",
            f"The special magic number for {key} mentioned in the provided text is",
            value,
            i,
        )
        for i, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    return _needles(rng, library, keys, values, asks)


def _list_asks(named: str, items: list[tuple[int, str]]) -> list[Ask]:
    prefix = f"The special magic numbers for {named} mentioned in the provided text are"
    question = f"What are all the special magic numbers for {named} mentioned in the provided text?"
    asks = []
    for fact, value in items:
        asks.append(Ask(question, prefix, value, fact))
        prefix += f" {value},"
    return asks


def _needles(
    rng: random.Random, library: Library, keys: list[str], values: list[str], asks: list[Ask]
) -> Draft:
    facts = tuple(
        f"One of the special magic numbers for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    )
    return Draft(_INTRO, facts, tuple(asks), filler.prose(rng, library))
