"""Endless text to hide facts in: paragraphs of prose, or definitions of Python code."""

from __future__ import annotations

import ast
import functools
import random
import re
from collections.abc import Iterator

from ...library import Library

_PARAGRAPH = (60, 500)  # characters
_DEFINITION = (40, 900)


def prose(rng: random.Random, library: Library) -> Iterator[str]:
    """Paragraphs of one source, in their order, from a random one on."""
    yield from _from_anywhere(rng, _paragraphs(library)[rng.randrange(len(library.prose))])


def code(rng: random.Random, library: Library) -> Iterator[str]:
    """Functions, small classes and assignments of modules, in their order, from a random one."""
    yield from _from_anywhere(rng, _definitions(library))


def _from_anywhere(rng: random.Random, pieces: tuple[str, ...]) -> Iterator[str]:
    start = rng.randrange(len(pieces))
    while True:
        yield from pieces[start:]
        start = 0


@functools.lru_cache(maxsize=8)
def _paragraphs(library: Library) -> tuple[tuple[str, ...], ...]:
    """Per source, every paragraph of running text, none twice."""
    result = []
    for _, documents in library.prose:
        found = (" ".join(p.split()) for text in documents for p in re.split(r"\n\s*\n", text))
        result.append(tuple(dict.fromkeys(p for p in found if _is_running_text(p))))
    return tuple(result)


def _is_running_text(paragraph: str) -> bool:
    low, high = _PARAGRAPH
    if not low <= len(paragraph) <= high or ">>>" in paragraph:
        return False
    plain = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    return paragraph[0].isupper() and paragraph[-1] == "." and plain > 0.93 * len(paragraph)


@functools.lru_cache(maxsize=8)
def _definitions(library: Library) -> tuple[str, ...]:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign)
    low, high = _DEFINITION
    result: dict[str, None] = {}
    for text in library.code:
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, kinds):
                own = lines[node.lineno - 1 : node.end_lineno]
                piece = "\n".join(line.rstrip() for line in own)
                if low <= len(piece) <= high and piece.isascii():
                    result[piece] = None
    return tuple(result)
