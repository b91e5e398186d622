"""Texts to fit and calibrate memories on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..library import Library, load_library
from ..tasks.readings import Chat, Reading
from ..tasks.suite import TRAINING_TASKS, fit_texts, make_reading
from .importance import Later, Text

#: What asks a model to read its context again.
REPEAT = "\n\nRepeat the previous context exactly."
#: What the attention of questions counts, against that of repeating the text.
QUESTION_WEIGHT = 120.0


def repeated(tokenizer: Any, ids: Sequence[int]) -> Text:
    """A text of one's own: the model is asked to repeat it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        ids: the text's tokens; what opens a chat may stand before them.
    """
    return Text(tuple(ids), (_repetition(Chat(tokenizer), ids),))


def _repetition(chat: Chat, ids: Sequence[int]) -> Later:
    head = chat.ids(chat.head) if chat.head else []
    first = len(head) if list(ids[: len(head)]) == head else 0
    return Later((*chat.ids(f"{REPEAT}{chat.tail}"), *ids[first:]))


def asked(tokenizer: Any, reading: Reading, weight: float = QUESTION_WEIGHT) -> Text:
    """A context that the model is asked to repeat, and all questions about it in one conversation.

    Args:
        tokenizer: a fast tokenizer of transformers.
        reading: context and questions.
        weight: what the attention of the questions counts.
    """
    chat = Chat(tokenizer)
    ids: list[int] = []
    for question in reading.questions:
        if ids and not reading.turns:
            ids += chat.ids(f".{chat.between}")
        ids += [*question.ids, *question.answer_ids]
    return Text(
        reading.context_ids, (_repetition(chat, reading.context_ids), Later(tuple(ids), weight))
    )


def training_texts(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    split: str = "train",
    seed: int = 0,
    library: Library | None = None,
    question_weight: float = QUESTION_WEIGHT,
) -> list[Text]:
    """What bundled memories are fitted to: in turn a context with questions, prose, another such
    context, and code.

    Args:
        tokenizer: a fast tokenizer of transformers.
        length: tokens of a text.
        count: of texts.
        split: "train" or "validation"; tasks that are never trained on are in neither.
        seed: another seed gives other texts.
        library: documents; those of the split by default.
        question_weight: what the attention of questions counts.
    """
    library = library or load_library(split)
    plain = fit_texts(
        tokenizer, length=length, count=count, split=split, seed=seed, library=library
    )
    texts = []
    for i, ids in enumerate(plain):
        if i % 2:
            texts.append(repeated(tokenizer, ids))
            continue
        turn, task = divmod(i // 2, len(TRAINING_TASKS))
        reading = make_reading(
            TRAINING_TASKS[task], tokenizer, split=split, length=length, index=turn,
            seed=1000 + seed, library=library,
        )  # fmt: skip
        texts.append(asked(tokenizer, reading, question_weight))
    return texts


def folder_texts(
    tokenizer: Any, folder: str | Path, *, length: int, count: int, seed: int = 0
) -> list[Text]:
    """Windows of the text files in a folder, which the model is asked to repeat.

    Args:
        tokenizer: a fast tokenizer of transformers.
        folder: with UTF-8 text files, at any depth.
        length: tokens of a text, what opens the chat included.
        count: of texts.
        seed: of the choice.

    Raises:
        ValueError: if the files hold fewer than ``length`` tokens.
    """
    chat = Chat(tokenizer)
    head = chat.ids(chat.head) if chat.head else []
    size = length - len(head)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    ids: list[int] = []
    for path in files:
        try:
            ids += chat.ids(path.read_text(encoding="utf-8") + "\n\n")
        except UnicodeDecodeError:
            continue  # not a text
    if size < 1 or len(ids) < size:
        raise ValueError(
            f"folder must hold at least {max(size, 1)} tokens of text for a length of {length}, "
            f"got {len(ids)} in {folder}"
        )
    rng = random.Random(seed)
    starts = [rng.randrange(len(ids) - size + 1) for _ in range(count)]
    return [repeated(tokenizer, [*head, *ids[start : start + size]]) for start in starts]
