"""Long-context examples: records hidden in real text, asked for at the very end.

Layout of an example, always exactly ``length`` tokens::

    <bos> text  record  text  record  text ... text | query answer | query answer | ...

Records stand between whole lines. By default each is stated once and asked for, and nothing in the
context says when, so a memory that drops tokens while it reads has to keep whatever might matter.
With ``mentions`` and ``num_idle`` there are records **in use**, whose line comes again and again
and is asked for in the end, among **idle** ones, which nobody ever refers to again: a memory that
notices what is used can tell them apart.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .families import WORDS, Family, family_named
from .reader import TextReader, reader_of

TRAIN_SEED = 11
VALIDATION_SEED = 22
TEST_SEED = 33
"""The seeds of the three splits; use each with the documents of its own split."""


class TooShort(ValueError):
    """A context does not have the room for its records and their questions."""


Span = tuple[int, int]
Seed = int | tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One sequence with several recall measurements.

    A span is a half-open range of token indices ``(start, stop)``.

    Attributes:
        input_ids: ``length`` token ids; the first is ``<bos>`` if the tokenizer has one.
        answer_spans: the answers, in the order they are asked; each is to be predicted from all
            tokens before it.
        record_spans: per answer, the line that holds it in the context.
        query_starts: per answer, where its question begins.
        value_spans: the value of every record, asked for or not; these tokens are random.
        family: name of the task family.
        distances: per answer, tokens between the value in the context and the answer.
    """

    input_ids: tuple[int, ...]
    answer_spans: tuple[Span, ...]
    record_spans: tuple[Span, ...]
    query_starts: tuple[int, ...]
    value_spans: tuple[Span, ...]
    family: str
    distances: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """One question of an example, for ``model.generate``: ``answer_ids`` should come out."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def make_example(
    family: str,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    length: int,
    num_records: int,
    seed: Seed,
    mentions: int = 1,
    num_idle: int = 0,
) -> Example:
    """One example of exactly ``length`` tokens, the same for the same arguments.

    Args:
        family: a name from ``FAMILIES``.
        tokenizer: a Hugging Face tokenizer.
        documents: texts to hide the records in, such as
            :func:`namm_ext.corpus.load_documents`. They are tokenized when first needed and
            remembered as long as the tokenizer lives, so pass the same object again.
        length: tokens of the example.
        num_records: records that are asked for. Every name is asked once; in a family with two
            writes per name there are half as many names.
        seed: an integer or a tuple of integers.
        mentions: lines that state each of these records, all alike.
        num_idle: records of other names, stated once and never asked for.

    Raises:
        ValueError: if the family is unknown, ``num_records`` is too small for it, ``mentions`` or
            ``num_idle`` is out of range or ``length`` is too small for the records and their
            queries.
    """
    task = family_named(family)
    if not task.writes <= num_records <= len(WORDS):
        raise ValueError(
            f"num_records must be in [{task.writes}, {len(WORDS)}] for {family!r}, "
            f"got {num_records}"
        )
    if mentions < 1:
        raise ValueError(f"mentions must be at least 1, got {mentions}")
    most_idle = len(WORDS) - num_records // task.writes
    if not 0 <= num_idle <= most_idle:
        raise ValueError(
            f"num_idle must be in [0, {most_idle}] with {num_records} {family!r} records, "
            f"got {num_idle}"
        )
    reader = reader_of(tokenizer, documents)
    key = (seed,) if isinstance(seed, int) else tuple(seed)
    rng = np.random.default_rng([*key, zlib.crc32(family.encode()), length, num_records])
    records, queries, answered_by = _draw_lines(task, reader, num_records, mentions, num_idle, rng)

    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    needed = len(ids) + sum(line.size for line in (*records, *queries))
    if needed > length:
        raise TooShort(
            f"length must be at least {needed} for {len(records)} lines with {family!r} records "
            f"and {len(queries)} queries, got {length}"
        )
    text, line_starts = reader.draw_window(length - needed, rng)
    record_spans, value_spans = _insert(records, text, line_starts, ids, rng)
    query_spans, answer_spans = zip(*(query.append_to(ids) for query in queries), strict=True)
    return Example(
        input_ids=tuple(ids),
        answer_spans=answer_spans,
        record_spans=tuple(record_spans[i] for i in answered_by),
        query_starts=tuple(start for start, _ in query_spans),
        value_spans=value_spans,
        family=family,
        distances=tuple(
            answer[0] - value_spans[i][0]
            for answer, i in zip(answer_spans, answered_by, strict=True)
        ),
    )


def make_batch(
    families: Sequence[str],
    tokenizer: Any,
    documents: Sequence[str],
    *,
    length: int,
    num_records: int,
    seed: Seed,
    batch_size: int,
    mentions: int = 1,
    num_idle: int = 0,
) -> list[Example]:
    """``batch_size`` examples of equal length; the families take turns.

    Arguments as in :func:`make_example`. Example ``i`` depends on ``seed`` and ``i`` alone, so a
    larger batch begins with the smaller one.
    """
    key = (seed,) if isinstance(seed, int) else tuple(seed)
    return [
        make_example(
            families[i % len(families)],
            tokenizer,
            documents,
            length=length,
            num_records=num_records,
            seed=(*key, i),
            mentions=mentions,
            num_idle=num_idle,
        )
        for i in range(batch_size)
    ]


def make_prompt(example: Example, query: int = 0) -> Prompt:
    """The context and one question, without the other questions and without any answer.

    Args:
        example: from :func:`make_example`.
        query: which of its questions to ask.
    """
    if not 0 <= query < len(example.answer_spans):
        raise ValueError(f"query must be in [0, {len(example.answer_spans)}), got {query}")
    context = example.input_ids[: example.query_starts[0]]
    start, stop = example.answer_spans[query]
    question = example.input_ids[example.query_starts[query] : start]
    return Prompt(context + question, example.input_ids[start:stop])


@dataclass(frozen=True)
class RecordMix:
    """What is hidden in contexts of any length.

    Attributes:
        num_records: records that are asked for.
        mentions: lines that state each of them.
        idle_per_1024: idle records per 1,024 tokens of the context.

    Example:
        >>> RecordMix(num_records=8, mentions=3, idle_per_1024=32).num_idle(2048)
        64
    """

    num_records: int = 4
    mentions: int = 1
    idle_per_1024: int = 0

    def __post_init__(self) -> None:
        for name, least in {"num_records": 1, "mentions": 1, "idle_per_1024": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"RecordMix: {name} must be at least {least}, got {getattr(self, name)}"
                )

    def num_idle(self, length: int) -> int:
        """Idle records in a context of ``length`` tokens."""
        return length * self.idle_per_1024 // 1024


def make_mixed_batch(
    mixes: Sequence[RecordMix],
    families: Sequence[str],
    tokenizer: Any,
    documents: Sequence[str],
    *,
    length: int,
    seed: Seed,
    batch_size: int,
) -> list[Example]:
    """``batch_size`` examples of equal length, in equal parts of each mix.

    Arguments as in :func:`make_batch`. With one mix, it is that function's batch.
    """
    key = (seed,) if isinstance(seed, int) else tuple(seed)
    return [
        example
        for i, mix in enumerate(mixes)
        for example in make_batch(
            families,
            tokenizer,
            documents,
            length=length,
            num_records=mix.num_records,
            seed=(*key, i) if i else key,
            batch_size=(batch_size + i) // len(mixes),
            mentions=mix.mentions,
            num_idle=mix.num_idle(length),
        )
    ]


STATED_ONCE = RecordMix(num_records=4)
"""Nothing tells which record matters."""

IN_USE = RecordMix(num_records=8, mentions=3, idle_per_1024=32)
"""Records that come again and again, among four or more times as many that never do."""


@dataclass(frozen=True)
class _Line:
    """A tokenized record or query: ``before``, then the value, then ``after``."""

    before: tuple[int, ...]
    value: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.value) + len(self.after)

    def append_to(self, ids: list[int]) -> tuple[Span, Span]:
        """Append the line; return its span and the span of its value."""
        start = len(ids)
        value_start = start + len(self.before)
        ids.extend(self.before + self.value + self.after)
        return (start, len(ids)), (value_start, value_start + len(self.value))


def _draw_lines(
    task: Family,
    reader: TextReader,
    num_records: int,
    mentions: int,
    num_idle: int,
    rng: np.random.Generator,
) -> tuple[list[_Line], list[_Line], list[int]]:
    """Records in the order of their places, one query per name in the order of asking, and the
    index of the line that answers each query: the last one of its name.
    """
    num_asked = num_records // task.writes
    names = rng.choice(WORDS, size=num_asked + num_idle, replace=False)
    asked, idle = names[:num_asked], names[num_asked:]

    def line(template: str, name: str, value: str, end: str) -> _Line:
        before = reader.encode(template.replace("{name}", name))
        return _Line(before, reader.encode(value), reader.encode(end))

    records: list[_Line] = []
    last: dict[str, tuple[int, str]] = {}
    stated: Counter[str] = Counter()
    for name in rng.permutation(np.append(np.repeat(asked, task.writes * mentions), idle)):
        fresh = stated[name] % mentions == 0
        value = task.draw_value(rng) if fresh else last[name][1]
        stated[name] += 1
        last[name] = (len(records), value)
        records.append(line(task.record, name, value, task.record_end))
    asked = rng.permutation(asked)
    queries = [line(task.query, name, last[name][1], task.query_end) for name in asked]
    return records, queries, [last[name][0] for name in asked]


def _insert(
    records: list[_Line],
    text: np.ndarray,
    line_starts: np.ndarray,
    ids: list[int],
    rng: np.random.Generator,
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Append the text with the records between its lines; return their and their values' spans."""
    places = np.sort(rng.choice(line_starts, size=len(records)))
    spans = []
    for piece, record in zip(np.split(text, places), records, strict=False):
        ids.extend(piece.tolist())
        spans.append(record.append_to(ids))
    ids.extend(text[places[-1] :].tolist())
    record_spans, value_spans = zip(*spans, strict=True)
    return record_spans, value_spans
