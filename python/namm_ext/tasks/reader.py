"""Documents of a tokenizer, tokenized one by one when they are first drawn."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np


class TextReader:
    """Draws windows of tokens from documents; a document is drawn as often as it is long."""

    def __init__(self, tokenizer: Any, documents: Sequence[str]):
        if isinstance(documents, str):
            raise ValueError(
                f"documents must be a sequence of texts, got the text {documents!r:.40}"
            )
        if not documents:
            raise ValueError("documents must not be empty")
        # A strong reference would keep the tokenizer alive through the cache it is the key of.
        self._tokenizer = weakref.proxy(tokenizer)
        self.documents = documents
        sizes = np.array([len(text) for text in documents], dtype=np.float64)
        self._cumulative = np.cumsum(sizes / sizes.sum())
        self._ids: dict[int, np.ndarray] = {}
        self._encoded: dict[str, tuple[int, ...]] = {}
        self._ends_line = np.array(
            [tokenizer.decode([i]).endswith("\n") for i in range(len(tokenizer))]
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a short piece of text, remembered."""
        if text not in self._encoded:
            self._encoded[text] = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return self._encoded[text]

    def draw_window(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """``size`` consecutive tokens that end with a line, and the places between its lines.

        The window may begin inside a line. A document shorter than the window is preceded by
        others.
        """
        pieces: list[np.ndarray] = []
        missing = size
        while missing > 0:
            ids = self._document(int(np.searchsorted(self._cumulative, rng.random())))
            line_ends = np.flatnonzero(self._ends_line[ids]) + 1
            long_enough = line_ends[line_ends >= missing]
            stop = int(rng.choice(long_enough)) if long_enough.size else ids.size
            pieces.insert(0, ids[max(0, stop - missing) : stop])
            missing -= pieces[0].size
        text = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return text, np.append(np.flatnonzero(self._ends_line[text]) + 1, 0)

    def _document(self, index: int) -> np.ndarray:
        index = min(index, len(self.documents) - 1)
        if index not in self._ids:
            text = self.documents[index]
            if not text.endswith("\n"):
                text += "\n"
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            self._ids[index] = np.array(ids, dtype=np.int64)
        return self._ids[index]


_readers: weakref.WeakKeyDictionary[Any, dict[int, TextReader]] = weakref.WeakKeyDictionary()


def reader_of(tokenizer: Any, documents: Sequence[str]) -> TextReader:
    """The reader of a (tokenizer, documents) pair; it holds the documents, so their id is safe."""
    readers = _readers.setdefault(tokenizer, {})
    if id(documents) not in readers:
        readers[id(documents)] = TextReader(tokenizer, documents)
    return readers[id(documents)]
