"""Methods side by side on the same contexts, in steps that an interruption falls between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..policy import Policy
from .costs import measure_costs
from .methods import Method, fixed_budget
from .results import FULL, Results, Row
from .workloads import Workload, bits_per_byte


@dataclass(frozen=True)
class Timing:
    """How time is measured.

    Attributes:
        new_tokens: tokens to generate.
        repeats: rounds, of which each method's fastest counts; 0 leaves time and bytes out.
    """

    new_tokens: int = 64
    repeats: int = 3


@dataclass(frozen=True)
class Step:
    """One measurement: its name, and what does it."""

    name: str
    run: Callable[[], None]


@dataclass(frozen=True)
class _Entry:
    """A method with its budget, and the row it fills."""

    policy: Policy | None
    row: Row


def plan(
    model: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    workloads: Sequence[Workload],
    keeps: Sequence[float],
    results: Results,
    timing: Timing,
) -> list[Step]:
    """What is still to be measured; rows that are complete are left alone.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        methods: what to compare.
        workloads: what to read, one per context length.
        keeps: budgets, as shares of a context. The full cache has none and is measured once.
        results: gets the rows at once, length by length and budget by budget.
        timing: of all methods and budgets of a length in turn.
    """
    steps: list[Step] = []
    for workload in workloads:
        entries = list(_entries(methods, workload, keeps, results))
        for entry in entries:
            steps += _quality(model, workload, entry)
        if timing.repeats and any(entry.row.cost is None for entry in entries):
            steps += _costs(model, tokenizer, workload, entries, timing)
    return steps


def compare(steps: Sequence[Step], results: Results, on_step: Callable[[int, str], None]) -> None:
    """Take the steps of a `plan`; the results are saved after each.

    Args:
        steps: in their order.
        results: that the plan was made for.
        on_step: called before each with how many are done and what it is about to do.
    """
    try:
        for i, step in enumerate(steps):
            on_step(i, step.name)
            step.run()
            results.save()
    finally:
        results.save(intervals=True)


def _entries(
    methods: Sequence[Method], workload: Workload, keeps: Sequence[float], results: Results
) -> Iterator[_Entry]:
    for method in methods:
        if method.policy is None:
            yield _Entry(None, results.row(method.name, {}, workload.length, 1.0))
    for keep in keeps:
        for method in methods:
            if method.policy is not None:
                row = results.row(method.name, method.settings, workload.length, keep)
                yield _Entry(fixed_budget(method.policy, keep, workload.length), row)


def _quality(model: Any, workload: Workload, entry: _Entry) -> Iterator[Step]:
    row, policy = entry.row, entry.policy
    budget = "" if policy is None else f", {100 * row.keep:.4g} % kept"
    name = f"{row.method}{budget}, {row.length:,} tokens"

    def ask(task: str) -> None:
        row.tasks[task] = workload.ask(model, policy, task)

    def read(kind: str) -> None:
        row.bits_per_byte[kind] = bits_per_byte(model, policy, workload.windows[kind])

    for task in workload.tasks:
        if task not in row.tasks:
            yield Step(f"{name}: {task}", partial(ask, task))
    if policy is not None and policy.two_passes:
        return  # it would read what is to be predicted
    for kind in workload.windows:
        if kind not in row.bits_per_byte:
            yield Step(f"{name}: {kind} as text", partial(read, kind))


def _costs(
    model: Any,
    tokenizer: Any,
    workload: Workload,
    entries: Sequence[_Entry],
    timing: Timing,
) -> Iterator[Step]:
    names = [
        FULL if entry.policy is None else f"{entry.row.method} {entry.row.keep}"
        for entry in entries
    ]
    measuring = measure_costs(
        model,
        tokenizer,
        dict(zip(names, (entry.policy for entry in entries), strict=True)),
        workload.prompt,
        new_tokens=timing.new_tokens,
        repeats=timing.repeats,
    )

    def run(last: bool) -> None:
        costs = next(measuring)
        for name, entry in zip(names, entries, strict=True):
            if last:
                entry.row.cost = costs[name]

    for i in range(1, timing.repeats + 1):
        name = f"time and bytes at {workload.length:,} tokens, {i} of {timing.repeats}"
        yield Step(name, partial(run, i == timing.repeats))
