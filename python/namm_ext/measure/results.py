"""What was measured: rows of a table, in a JSON file that an interrupted run goes on from."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .._files import write_file
from ..answers import interval

FULL = "full cache"

#: A number and the bounds of its 95 % interval.
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Cost:
    """What a memory costs on one prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        kept: tokens kept after the last update / tokens seen, at the end of the prompt.
        kv_bytes: k and v as allocated at the end of the prompt, room for new tokens included.
        memory_bytes: the memory's own state then: features, positions, windows, indices.
        peak_bytes: the most that both ever were together, the rebuilding included.
        full_bytes: k and v of the stock cache, measured on the same prompt.
        prefill_seconds: to read the prompt and choose the first token.
        decode_seconds: per generated token, updates included.
        decode_tokens: how many were generated.
    """

    prompt_tokens: int
    kept: float
    kv_bytes: int
    memory_bytes: int
    peak_bytes: int
    full_bytes: int
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int

    @property
    def kv_fraction(self) -> float:
        """k and v against the full cache."""
        return self.kv_bytes / self.full_bytes

    @property
    def own_fraction(self) -> float:
        """The memory's own state against the full cache."""
        return self.memory_bytes / self.full_bytes

    @property
    def total_fraction(self) -> float:
        """k, v and the memory's own state against the full cache."""
        return (self.kv_bytes + self.memory_bytes) / self.full_bytes


@dataclass(frozen=True)
class TaskResult:
    """One method on one task.

    Attributes:
        questions: how many were asked.
        exact_match: per context, the share of its questions answered right in every token.
        kept: per context, tokens kept after the last update / tokens seen.
    """

    questions: int
    exact_match: list[float]
    kept: list[float]

    @property
    def accuracy(self) -> float:
        """Mean of ``exact_match``."""
        return sum(self.exact_match) / len(self.exact_match)


@dataclass
class Row:
    """One method at one context length and budget; what is not measured yet is missing.

    Attributes:
        method: its name.
        settings: what defines it.
        length: tokens of a context.
        keep: the budget, as a share of ``length``; 1 for the full cache.
        tasks: results by task.
        bits_per_byte: cross-entropy of text, by kind of text.
        cost: bytes and times, on one prompt of ``length`` tokens.
    """

    method: str
    settings: dict[str, Any]
    length: int
    keep: float
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    cost: Cost | None = None

    @property
    def accuracy(self) -> float | None:
        """Mean over the tasks."""
        if not self.tasks:
            return None
        return sum(task.accuracy for task in self.tasks.values()) / len(self.tasks)

    @property
    def kept(self) -> float | None:
        """Tokens kept / tokens seen, mean over all contexts."""
        values = [share for task in self.tasks.values() for share in task.kept]
        return sum(values) / len(values) if values else None

    @property
    def questions(self) -> int:
        """Over all tasks."""
        return sum(task.questions for task in self.tasks.values())

    def accuracy_interval(self) -> Interval | None:
        """``accuracy`` with its interval; None if there is too little to say."""
        return _interval([self], lambda own: own) if self.tasks else None

    def share_of(self, full: Row) -> Interval | None:
        """``accuracy`` against another row's on the same contexts, with its paired interval.

        None if the tasks differ, the other row has no right answer, or there is too little to say.
        """
        if not self.tasks or self.tasks.keys() != full.tasks.keys() or not full.accuracy:
            return None
        # A draw without any right answer says nothing; it is as rare as such a table is useless.
        return _interval([self, full], lambda own, all_: own / np.maximum(all_, 1e-9))

    def bits_over(self, full: Row) -> float | None:
        """Bits per byte against another row's, mean over the kinds of text; 0 if they are equal."""
        if not self.bits_per_byte or self.bits_per_byte.keys() != full.bits_per_byte.keys():
            return None
        ratios = [bits / full.bits_per_byte[kind] for kind, bits in self.bits_per_byte.items()]
        return sum(ratios) / len(ratios) - 1

    def to_dict(self, full: Row | None = None) -> dict[str, Any]:
        """Plain values, for JSON; with the intervals if the full cache's row is given."""
        values: dict[str, Any] = {**asdict(self), "accuracy": self.accuracy, "kept": self.kept}
        values["questions"] = self.questions
        if full is not None:
            values["interval"] = self.accuracy_interval()
            values["share_of_full"] = self.share_of(full)
            values["bits_over_full"] = self.bits_over(full)
        if self.cost is not None:
            values["cost"] |= {
                "kv_fraction": self.cost.kv_fraction,
                "own_fraction": self.cost.own_fraction,
                "total_fraction": self.cost.total_fraction,
            }
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` gave, without what follows from the rest."""
        cost = values["cost"]
        return cls(
            values["method"],
            values["settings"],
            values["length"],
            values["keep"],
            {name: TaskResult(**result) for name, result in values["tasks"].items()},
            values["bits_per_byte"],
            cost and Cost(**{name: cost[name] for name in Cost.__dataclass_fields__}),
        )


def _interval(rows: list[Row], statistic: Callable[..., Any]) -> Interval | None:
    """A statistic of the rows' mean scores, and its interval.

    Contexts are drawn again within each task. Where a task has a single context, tasks are drawn
    again as wholes, which gives a wider interval.
    """
    tasks = rows[0].tasks
    counts = [len(task.exact_match) for task in tasks.values()]
    labels = np.repeat(list(tasks), counts)
    scores = [np.concatenate([row.tasks[name].exact_match for name in tasks]) for row in rows]
    if min(counts) < 2:
        labels = np.zeros(len(tasks))
        scores = [np.array([row.tasks[name].accuracy for name in tasks]) for row in rows]
        if len(tasks) < 2:
            return None
    return interval(
        scores, np.arange(len(labels)), tasks=labels, statistic=statistic, resamples=2000
    )


class Results:
    """Rows, and the file that has them.

    Args:
        settings: what all rows depend on, as plain values.
        path: of a JSON file; None keeps the rows in memory. Rows that are there are kept.

    Raises:
        ValueError: if the file has rows of other settings, or is none of these files.
    """

    def __init__(self, settings: dict[str, Any], path: Path | None = None) -> None:
        self.settings = json.loads(json.dumps(settings))
        self.path = path
        self.rows: list[Row] = []
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row.from_dict(row) for row in content["rows"]]
            settings = content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--json: {path} is not a file of results ({error!r})") from error
        differ = [
            f"{name} {settings.get(name)!r}, now {self.settings.get(name)!r}"
            for name in sorted({*settings, *self.settings})
            if settings.get(name) != self.settings.get(name)
        ]
        if differ:
            raise ValueError(
                f"--json: {path} has rows of other settings ({'; '.join(differ)}); "
                "name another file or delete it"
            )
        self.rows = rows

    def row(self, method: str, settings: dict[str, Any], length: int, keep: float) -> Row:
        """The row of a method, as far as it is measured; a new one if its settings changed."""
        settings = json.loads(json.dumps(settings))
        key = (method, length, keep)
        for i, row in enumerate(self.rows):
            if (row.method, row.length, row.keep) == key:
                if row.settings != settings:
                    self.rows[i] = Row(method, settings, length, keep)
                return self.rows[i]
        self.rows.append(Row(method, settings, length, keep))
        return self.rows[-1]

    def full(self, length: int) -> Row | None:
        """The full cache's row."""
        found = (row for row in self.rows if row.method == FULL and row.length == length)
        return next(found, None)

    def to_dict(self, intervals: bool = True) -> dict[str, Any]:
        """What is in the file; the intervals take a moment."""
        full = {row.length: self.full(row.length) if intervals else None for row in self.rows}
        return {
            "namm_ext": __version__,
            "settings": self.settings,
            "machine": machine(),
            "rows": [row.to_dict(full[row.length]) for row in self.rows],
        }

    def save(self, intervals: bool = False) -> None:
        """Write the file anew, if there is one."""
        if self.path is not None:
            write_json(self.path, self.to_dict(intervals))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file as a whole; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def machine() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    import transformers

    from .._library import libraries

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instruction_set": libraries.supported_isas[-1],
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
