"""Code that is completed with what was defined far above."""

from __future__ import annotations

import random
from dataclasses import replace

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
        value = text if i % 2 else number
        quote = '"' if i % 2 else ""
        if i % 4 < 2:
            facts.append(f"{name.upper()} = {quote}{value}{quote}")
            left = name.upper()
        else:
            facts.append(f"def get_{name}():\n    return {quote}{value}{quote}")
            left = f"get_{name}()"
        question = "Complete the test with the value from the code above."
        prefix = f"```python\nassert {left} =="
        space = f" {quote}"
        asks.append(Ask(question, prefix, value, i, space))
    order = rng.sample(range(len(facts)), len(facts))
    where = {old: new for new, old in enumerate(order)}
    return Draft(
        "Read the following Python code. I will ask you to complete a test of it.",
        tuple(facts[i] for i in order),
        tuple(replace(ask, fact=where[i]) for i, ask in enumerate(asks)),
        filler.code(rng, library),
        gap="\n\n\n",
    )
