"""Prose and code for long contexts, from what every installation carries, split once.

Prose are docstrings of the standard library; code are its modules. `HELD_OUT_SOURCE`, the language
reference behind ``help()``, is prose that only the test split has. A module that is in the
validation or test split of `corpus` stays there; of the others a tenth each goes to these two, so
that there is enough text.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from .corpus import SPLITS, module_documents, split_of

#: Never in a context that something is trained on.
HELD_OUT_SOURCE = "topics"


@dataclass(frozen=True, eq=False)
class Library:
    """What contexts are made of.

    Attributes:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        prose: ``(source, documents)`` for each source of English text.
        code: Python modules.
    """

    split: str
    prose: tuple[tuple[str, tuple[str, ...]], ...]
    code: tuple[str, ...]


@functools.cache
def load_library(split: str) -> Library:
    """The texts of one split, in the order of their names.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        ValueError: if ``split`` is none of these.

    Example:
        >>> [source for source, _ in load_library("test").prose]
        ['docstrings', 'topics']
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    texts: dict[str, list[str]] = {"source": [], "docstrings": []}
    for _, kind, text in sorted(module_documents(lambda module: _split_of(module) == split)):
        texts[kind].append(text)
    prose = [("docstrings", tuple(texts["docstrings"]))]
    if split == "test" and (topics := _topics()):
        prose.append((HELD_OUT_SOURCE, topics))
    return Library(split, tuple(prose), tuple(texts["source"]))


def _split_of(module: str) -> str:
    split = split_of(module)
    if split != "train":
        return split
    tenth = hashlib.sha256(f"library/{module}".encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(tenth, "train")


def _topics() -> tuple[str, ...]:
    """The language reference; nothing where Python comes without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ()
    return tuple(text for _, text in sorted(topics.items()))
