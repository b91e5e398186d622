"""Tasks that people recognise, as readings for any model that chats, and texts to fit on.

Every reading depends on its task, split, length, seed and index alone. Names, values and documents
are divided once among train, validation and test. One task, one family of facts and one source of
documents are never in anything that is trained on. How many facts there are and how they are asked
was chosen by what the full cache of SmolLM2-135M-Instruct answers, never by a memory.

Example:
    >>> from namm_ext import zoo
    >>> from namm_ext.tasks import suite
    >>> tokenizer = zoo.load_tokenizer()
    >>> reading = suite.make_reading("single", tokenizer, split="test", length=512, index=0)
    >>> len(reading.context_ids), len(reading.questions)
    (512, 1)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from ...library import HELD_OUT_SOURCE, Library, load_library
from ..readings import Chat, Draft, Question, Reading, lay_out
from . import code, facts, filler, lists, needles
from .facts import FACT_FAMILIES, HELD_OUT_FAMILY, FactFamily
from .windows import TextWindow, text_windows

_GENERATORS: dict[str, Callable[[random.Random, Library], Draft]] = {
    "single": needles.single,
    "multi_key": needles.multi_key,
    "multi_value": needles.multi_value,
    "multi_query": needles.multi_query,
    "paraphrase": facts.paraphrase,
    "overwritten": facts.overwritten,
    "multi_turn": facts.multi_turn,
    "many_shot": lists.many_shot,
    "table": lists.table,
    "code": code.code,
    "variable_tracking": needles.variable_tracking,
    "unseen_family": facts.unseen_family,
}
#: All tasks, in the order of tables.
TASKS = tuple(_GENERATORS)
#: Never trained on: a task of its own, and the family of facts that is held out.
HELD_OUT_TASKS = ("variable_tracking", "unseen_family")
#: What may be trained on.
TRAINING_TASKS = tuple(task for task in TASKS if task not in HELD_OUT_TASKS)

__all__ = [
    "FACT_FAMILIES",
    "HELD_OUT_FAMILY",
    "HELD_OUT_SOURCE",
    "HELD_OUT_TASKS",
    "TASKS",
    "TRAINING_TASKS",
    "FactFamily",
    "TextWindow",
    "fit_texts",
    "make_reading",
    "make_readings",
    "make_visible_reading",
    "text_windows",
]


def make_reading(
    task: str,
    tokenizer: Any,
    *,
    split: str,
    length: int,
    index: int,
    seed: int = 0,
    library: Library | None = None,
) -> Reading:
    """One reading.

    Args:
        task: one of `TASKS`.
        tokenizer: a fast tokenizer of transformers, with or without a chat template.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        length: tokens of the context.
        index: which reading of this task.
        seed: another seed gives other readings.
        library: documents to hide the facts in; those of the split by default.

    Raises:
        ValueError: if the task or the split is unknown, or the facts do not fit into the length.
    """
    rng = random.Random(f"{task}/{split}/{length}/{seed}/{index}")
    draft = _draw(task, split, rng, library)
    return lay_out(task, draft, Chat(tokenizer), length, rng)


def make_visible_reading(
    task: str,
    tokenizer: Any,
    *,
    split: str,
    length: int,
    index: int,
    seed: int = 0,
    library: Library | None = None,
) -> Reading:
    """A reading of one question, which stands in the context already, up to its last token.

    What is kept of the context may depend on the question then. Arguments as in `make_reading`.
    """
    rng = random.Random(f"{task}/{split}/{length}/{seed}/{index}")
    draft = _draw(task, split, rng, library)
    which = 0 if draft.turns else index % len(draft.asks)
    chat = Chat(tokenizer)
    asked = chat.question(draft.asks[which])
    reading = lay_out(task, draft, chat, length - len(asked.ids) + 1, rng)
    return Reading(
        task,
        (*reading.context_ids, *asked.ids[:-1]),
        (Question(asked.ids[-1:], asked.answer_ids),),
        (reading.spans[which],),
    )


def _draw(task: str, split: str, rng: random.Random, library: Library | None) -> Draft:
    if task not in _GENERATORS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    if split == "train" and task in HELD_OUT_TASKS:
        raise ValueError(f"{task} is never trained on, the train split does not have it")
    return _GENERATORS[task](rng, library or load_library(split))


def make_readings(
    task: str,
    tokenizer: Any,
    count: int,
    *,
    split: str,
    length: int,
    seed: int = 0,
    library: Library | None = None,
) -> list[Reading]:
    """The first ``count`` readings of a task; arguments as in `make_reading`."""
    return [
        make_reading(
            task, tokenizer, split=split, length=length, index=i, seed=seed, library=library
        )
        for i in range(count)
    ]


def fit_texts(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    split: str = "train",
    seed: int = 0,
    library: Library | None = None,
) -> list[tuple[int, ...]]:
    """Contexts without questions, to fit and calibrate memories on.

    In turn a context of a task of `TRAINING_TASKS`, prose, another such context, and code.

    Returns:
        ``count`` times ``length`` token ids.
    """
    library = library or load_library(split)
    chat = Chat(tokenizer)
    texts = []
    for i in range(count):
        rng = random.Random(f"fit/{split}/{length}/{seed}/{i}")
        if i % 2 == 0:
            task = TRAINING_TASKS[(i // 2) % len(TRAINING_TASKS)]
            draft = _GENERATORS[task](rng, library)
            texts.append(lay_out(task, draft, chat, length, rng).context_ids)
        else:
            pieces = filler.prose(rng, library) if i % 4 == 1 else filler.code(rng, library)
            texts.append(_plain(chat, pieces, "\n\n" if i % 4 == 1 else "\n\n\n", length))
    return texts


def _plain(chat: Chat, pieces: Iterator[str], gap: str, length: int) -> tuple[int, ...]:
    text = ""
    ids: list[int] = []
    while len(ids) < length:
        text += next(pieces) + gap
        ids = chat.ids(text)
    return tuple(ids[:length])
