"""Plain text: windows to measure bits per byte on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextWindow:
    """A stretch of text of which the second half is scored.

    Attributes:
        ids: its tokens.
        start: the first token that is scored.
        num_bytes: UTF-8 bytes of the scored text.
    """

    ids: tuple[int, ...]
    start: int
    num_bytes: int


def text_windows(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, *, seed: int = 0
) -> list[TextWindow]:
    """Windows of texts one after the other, from evenly spread places on.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: documents, joined by empty lines in a random order.
        length: tokens of a window.
        count: number of windows; they do not overlap.
        seed: of the order.

    Raises:
        ValueError: if the texts are too short for so many windows.
    """
    order = list(texts)
    random.Random(f"{seed}/windows").shuffle(order)
    text = "\n\n".join(order)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded.input_ids, encoded.offset_mapping
    if len(ids) < length * count:
        raise ValueError(
            f"texts have {len(ids)} tokens, {count} windows of {length} need {length * count}"
        )
    windows = []
    for i in range(count):
        begin = i * (len(ids) - length) // max(1, count - 1)
        middle, end = begin + length // 2, begin + length
        scored = text[offsets[middle][0] : offsets[end - 1][1]]
        windows.append(TextWindow(tuple(ids[begin:end]), length // 2, len(scored.encode("utf-8"))))
    return windows
