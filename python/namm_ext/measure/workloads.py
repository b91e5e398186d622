"""What is read and asked, at one context length, on texts that nothing was trained on.

A model that chats gets the readings of :mod:`namm_ext.tasks.suite`: each context is read once, then
questions follow. Another one gets records hidden in real text, asked for at the end of it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import tasks
from ..answers import answer_readings, text_bits
from ..baselines import Full
from ..corpus import load_documents
from ..evolution import evaluate_policy
from ..library import load_library
from ..policy import Policy
from ..tasks import suite
from ..tasks.readings import Reading
from ..tasks.suite import TextWindow, text_windows
from .results import TaskResult

FAMILIES = (*tasks.EVOLUTION_FAMILIES, *tasks.HELD_OUT_FAMILIES, *tasks.UNSEEN_FAMILIES)
"""Tasks of hidden records."""

SPLITS = ("test", "validation")


class Workload(Protocol):
    """Contexts with questions, and text."""

    @property
    def length(self) -> int:
        """Tokens of a context and of a window of text."""
        ...

    @property
    def windows(self) -> Mapping[str, Sequence[TextWindow]]:
        """By kind of text."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names."""
        ...

    @property
    def prompt(self) -> Tensor:
        """``[1, length]`` token ids to measure time and bytes on."""
        ...

    def ask(self, model: Any, policy: Policy | None, task: str) -> TaskResult:
        """Let a model with a memory do one task; None is the stock cache."""
        ...


def bits_per_byte(model: Any, policy: Policy | None, windows: Sequence[TextWindow]) -> float:
    """Cross-entropy of the scored parts of all windows together."""
    bits = text_bits(model, policy, windows)
    num_bytes = np.array([window.num_bytes for window in windows])
    return float((bits * num_bytes).sum() / num_bytes.sum())


@dataclass(frozen=True)
class ReadingWorkload:
    """Readings for a model that chats.

    Attributes:
        tokenizer: of the model.
        length: tokens of a context and of a window of text.
        readings: by task.
        windows: of prose and of code; the first half is read, the second one scored.
    """

    tokenizer: Any = field(compare=False)
    length: int
    readings: Mapping[str, Sequence[Reading]]
    windows: Mapping[str, Sequence[TextWindow]]

    @classmethod
    def make(
        cls,
        tokenizer: Any,
        split: str,
        *,
        length: int,
        names: Sequence[str] = suite.TASKS,
        questions: int = 24,
        num_windows: int = 4,
        question_visible: bool = False,
    ) -> ReadingWorkload:
        """Draw a workload, the same for the same arguments.

        Args:
            tokenizer: of the model that will read it.
            split: whose documents, ``"test"`` or ``"validation"``.
            length: tokens of a context and of a window of text.
            names: of the tasks.
            questions: at least so many per task; the questions of a context are all asked.
            num_windows: windows of each kind of text; with 0 no text is read.
            question_visible: whether the question stands at the end of what the memory reads, one
                per context. Otherwise it comes when the memory has read everything.

        Raises:
            ValueError: if the split or a task is unknown, or something does not fit.
        """
        _check_split(split)
        draw = suite.make_visible_reading if question_visible else suite.make_reading
        readings: dict[str, list[Reading]] = {}
        for name in names:
            drawn: list[Reading] = []
            while sum(len(reading.questions) for reading in drawn) < questions:
                drawn.append(draw(name, tokenizer, split=split, length=length, index=len(drawn)))
            readings[name] = drawn
        if not num_windows:
            return cls(tokenizer, length, readings, {})
        library = load_library(split)
        texts = {
            "prose": [text for _, documents in library.prose for text in documents],
            "code": library.code,
        }
        windows = {
            kind: text_windows(tokenizer, documents, length, num_windows)
            for kind, documents in texts.items()
        }
        return cls(tokenizer, length, readings, windows)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.readings)

    @property
    def prompt(self) -> Tensor:
        return torch.tensor([next(iter(self.readings.values()))[0].context_ids])

    def ask(self, model: Any, policy: Policy | None, task: str) -> TaskResult:
        questions, shares, kept = 0, [], []
        for reading in self.readings[task]:
            own = policy and policy.for_context(model, self.tokenizer, reading.context_ids)
            answers = answer_readings(model, own, [reading])
            questions += len(answers.correct)
            shares.append(answers.accuracy())
            kept.append(float(answers.kept[0]))
        return TaskResult(questions, shares, kept)


@dataclass(frozen=True)
class RecordWorkload:
    """Records hidden in real text, for any model.

    Attributes:
        length: tokens of a context and of a window of text.
        examples: by task family.
        windows: of source code, scored from the second token on.
    """

    length: int
    examples: Mapping[str, Sequence[tasks.Example]]
    windows: Mapping[str, Sequence[TextWindow]]

    @classmethod
    def make(
        cls,
        tokenizer: Any,
        split: str,
        *,
        length: int,
        names: Sequence[str] = FAMILIES,
        examples_per_task: int = 6,
        mix: tasks.RecordMix = tasks.IN_USE,
        num_windows: int = 8,
    ) -> RecordWorkload:
        """Draw a workload with the fixed seed of ``split``.

        Args:
            tokenizer: of the model that will read it.
            split: whose documents and seed, ``"test"`` or ``"validation"``.
            length: tokens per context and per window.
            names: task families.
            examples_per_task: contexts of each.
            mix: records hidden in a context; fewer of them are asked for where they do not fit.
            num_windows: windows of source code; with 0 no text is read.

        Raises:
            ValueError: if ``split`` is neither or the documents are shorter than ``length``.
        """
        _check_split(split)
        seeds = {"test": tasks.TEST_SEED, "validation": tasks.VALIDATION_SEED}
        documents = load_documents(split)
        while True:
            try:
                examples = tasks.make_mixed_batch(
                    (mix,), names, tokenizer, documents, length=length, seed=seeds[split],
                    batch_size=examples_per_task * len(names),
                )  # fmt: skip
                break
            except tasks.TooShort:
                if mix.num_records == 1:
                    raise
                mix = replace(mix, num_records=mix.num_records - 1)
        by_family = {name: [e for e in examples if e.family == name] for name in names}
        if not num_windows:
            return cls(length, by_family, {})
        windows = {"code": source_windows(tokenizer, documents, length, num_windows)}
        return cls(length, by_family, windows)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.examples)

    @property
    def prompt(self) -> Tensor:
        return torch.tensor([next(iter(self.examples.values()))[0].input_ids])

    def ask(self, model: Any, policy: Policy | None, task: str) -> TaskResult:
        examples = self.examples[task]
        # Keeping all on the ragged store is the stock cache, number for number.
        result = evaluate_policy(model, policy or Full(), examples)
        questions = sum(len(example.answer_spans) for example in examples)
        return TaskResult(questions, result.exact_match[0].tolist(), result.kept[0].tolist())


def source_windows(
    tokenizer: Any, documents: Sequence[str], length: int, count: int
) -> list[TextWindow]:
    """``count`` windows that begin with a line, spread evenly over the Python source.

    Raises:
        ValueError: if there is not enough source.
    """
    source = "\n\n".join(text for text in documents if _is_source(text))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    reach = 8 * length  # characters; a token of source code has about three
    if len(source) <= reach:
        raise ValueError(f"length must be below {len(source) // 8} tokens, got {length}")
    windows = []
    for place in np.linspace(0, len(source) - reach, count).astype(int).tolist():
        begin = source.index("\n", place) + 1
        ids = tokenizer.encode(source[begin : begin + reach], add_special_tokens=False)[:size]
        if len(ids) < size:
            raise ValueError(f"length must fit into {reach} characters of source, got {length}")
        num_bytes = len(tokenizer.decode((bos + ids)[1:]).encode())
        windows.append(TextWindow((*bos, *ids), 1, num_bytes))
    return windows


def _is_source(text: str) -> bool:
    try:
        return bool(ast.parse(text).body) and "import " in text
    except (SyntaxError, ValueError):
        return False


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be 'test' or 'validation', got {split!r}")
