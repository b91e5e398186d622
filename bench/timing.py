"""What is timed, on which of many equal inputs, and how.

The layers of a model take turns, so that none finds its store in the processor's cache. A
``Rotation`` does the same: it holds equal stores of ``ROTATE_BYTES`` together, whatever N is, and
each call works on the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: what the stores of a rotation hold together; far more than any cache of a CPU.
ROTATE_BYTES = 512 * 2**20


class Rotation:
    """One call after the other on several equal inputs.

    The result of a call stays alive until its input is due again, as a model's new store does.
    """

    def __init__(self, runs: list[Callable[[], Any]]) -> None:
        self.runs = runs
        self.results: list[Any] = [None] * len(runs)
        self.turn = 0

    def __call__(self) -> Any:
        turn, self.turn = self.turn, (self.turn + 1) % len(self.runs)
        self.results[turn] = self.runs[turn]()
        return self.results[turn]


def num_copies(*tensors: Tensor) -> int:
    """How many copies of these fill ``ROTATE_BYTES``."""
    return max(1, round(ROTATE_BYTES / sum(t.nbytes for t in tensors)))


def copies(*tensors: Tensor) -> list[Any]:
    """These, and copies for a rotation; a single tensor by itself."""
    sets = [tensors] + [tuple(t.clone() for t in tensors) for _ in range(num_copies(*tensors) - 1)]
    return sets if len(tensors) > 1 else [t for (t,) in sets]


@dataclass
class Case:
    """One thing to time, its plain expression and its floor (None: not possible, or none)."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any] | None
    floor: Callable[[], Any] | None
    check: Callable[[], None]
    floor_name: str
    #: what nanoseconds per token are counted in
    num_tokens: int = 1
    #: of the products Q K^T (and P V), or 0
    flops: int = 0


def interleaved(case: Case, rounds: int, seconds: float = 6.0) -> dict[str, float]:
    """Least CPU seconds of each of the three, taken in turns; a slow plain one at most 3 times.

    Of a rotation every member is timed in every round, and the mean of their minima counts. Two
    rounds are the least; then no other begins after so many seconds.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, list[float]] = {}
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and time.perf_counter() - begun > seconds:
            break
        for what in ("ours", "plain", "floor"):
            run = getattr(case, what)
            turns = len(run.runs) if isinstance(run, Rotation) else 1
            if run is None or (what == "plain" and i >= 3 and sum(best[what]) > 0.5):
                continue
            times = best.setdefault(what, [math.inf] * turns)
            for turn in range(turns):
                start = clock()
                run()
                times[turn] = min(times[turn], clock() - start)
    return {what: sum(times) / len(times) for what, times in best.items()}
