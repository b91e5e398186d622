"""Needles in a haystack and variable tracking, as RULER defines them (arXiv 2404.06654).

The wordings, the beginnings of the answers and what varies between the tasks are RULER's: one key
with one value; several keys, of which one is asked; a key with several values; several keys asked
at once; chains of variables. The haystack is prose, facts stand between sentences. Numbers have
five digits, variables are words. Where RULER counts how many items of a list are named, here each
item is a question of its own, behind the items before it; and a chain is followed from its end,
step by step, where RULER asks for all of its variables: small models fail at that with any cache.
"""

from __future__ import annotations

import random

from ...library import Library
from ..readings import Ask, Draft
from . import filler
from .words import numbers, things, words

_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)


def single(rng: random.Random, library: Library) -> Draft:
    """One key, one value."""
    return _keys(rng, library, 1)


def multi_key(rng: random.Random, library: Library) -> Draft:
    """Four keys of one value each; each is asked."""
    return _keys(rng, library, 4)


def multi_value(rng: random.Random, library: Library) -> Draft:
    """Two keys of two values each; each value is asked, behind those before it."""
    keys = things(rng, library.split, 2)
    owners = keys * 2
    rng.shuffle(owners)
    values = numbers(rng, 5, len(owners))
    asks = []
    for key in keys:
        question = (
            f"What are all the special magic numbers for {key} mentioned in the provided text?"
        )
        prefix = f"The special magic numbers for {key} mentioned in the provided text are"
        for fact, owner in enumerate(owners):
            if owner == key:
                asks.append(Ask(question, prefix, values[fact], fact))
                prefix += f" {values[fact]} and"
    return _needles(rng, library, owners, values, asks)


def multi_query(rng: random.Random, library: Library) -> Draft:
    """Four keys of one value each; two are asked at once, each behind those before it."""
    keys = things(rng, library.split, 4)
    values = numbers(rng, 5, len(keys))
    order = rng.sample(range(4), 4)
    asks = []
    for group in (order[:2], order[2:]):
        named = " and ".join(keys[i] for i in group)
        question = (
            f"What are all the special magic numbers for {named} mentioned in the provided text?"
        )
        prefix = f"The special magic numbers for {named} mentioned in the provided text are:"
        for fact in group:
            asks.append(Ask(question, f"{prefix} {keys[fact]}:", values[fact], fact))
            prefix += f" {keys[fact]}: {values[fact]},"
    return _needles(rng, library, keys, values, asks)


def variable_tracking(rng: random.Random, library: Library) -> Draft:
    """Two chains of a value and three variables; each step from the last variable is asked."""
    names = rng.sample(words("noun", library.split), 6)
    chains = [[value, *names[3 * i : 3 * i + 3]] for i, value in enumerate(numbers(rng, 5, 2))]
    # The lines of a chain keep their order, the chains mix.
    order = [0] * 3 + [1] * 3
    rng.shuffle(order)
    facts: list[str] = []
    asks: list[Ask] = []
    for i, which in enumerate(order):
        chain, step = chains[which], order[:i].count(which)
        source = chain[step] if step == 0 else f"VAR {chain[step]}"
        facts.append(f"VAR {chain[step + 1]} = {source}.")
    for which, chain in enumerate(chains):
        lines = [i for i, other in enumerate(order) if other == which]
        question = f"Trace the variable {chain[-1]} back to its value, assignment by assignment."
        prefix = "The chain of variable assignment in the text above:"
        for step in (2, 1, 0):
            prefix += f" VAR {chain[step + 1]} = {'VAR' if step else ''}".rstrip()
            asks.append(Ask(question, prefix, chain[step], lines[step]))
            prefix += f" {chain[step]}."
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


def _needles(
    rng: random.Random, library: Library, keys: list[str], values: list[str], asks: list[Ask]
) -> Draft:
    facts = tuple(
        f"One of the special magic numbers for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    )
    return Draft(_INTRO, facts, tuple(asks), filler.prose(rng, library))
