"""Code that is completed with what was defined far above."""

from __future__ import annotations

import random

from ...library import Library
from ..readings import Ask, Draft
from . import filler
from .words import numbers, words


def code(rng: random.Random, library: Library) -> Draft:
    """Six definitions among the code of other modules: constants, defaults, returned values."""
    split = library.split
    names = [
        f"{a}_{b}"
        for a, b in zip(*(rng.sample(words("identifier", split), 6) for _ in "ab"), strict=True)
        if a != b
    ]
    integers = numbers(rng, 3, len(names))
    texts = rng.sample(words("noun", split), len(names))
    facts, asks = [], []
    for i, (name, number, text) in enumerate(zip(names, integers, texts, strict=True)):
        kind = i % 4
        if kind == 0:
            facts.append(f"{name.upper()} = {number}")
            left, answer = f"{name.upper()} ==", number
        elif kind == 1:
            facts.append(f'{name.upper()} = "{text}"')
            left, answer = f"{name.upper()} ==", f'"{text}"'
        elif kind == 2:
            facts.append(f"def get_{name}():\n    return {number}")
            left, answer = f"get_{name}() ==", number
        else:
            facts.append(f'def get_{name}():\n    return "{text}"')
            left, answer = f"get_{name}() ==", f'"{text}"'
        question = "Complete the test with the value from the code above."
        asks.append(Ask(question, f"```python\nassert {left}", answer, i))
    order = rng.sample(range(len(facts)), len(facts))
    where = {old: new for new, old in enumerate(order)}
    return Draft(
        "Read the following Python code. I will ask you to complete a test of it.",
        tuple(facts[i] for i in order),
        tuple(Ask(a.question, a.prefix, a.answer, where[i]) for i, a in enumerate(asks)),
        filler.code(rng, library),
        gap="\n\n\n",
    )
