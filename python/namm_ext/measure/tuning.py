"""The settings of each baseline that answer most questions of the validation split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..baselines import Baseline
from ..baselines.grid import GRID
from .methods import Method, at_pace, fixed_budget, made_ready
from .workloads import Workload


def tune(
    model: Any,
    tokenizer: Any,
    workload: Workload,
    *,
    rules: Sequence[str] = tuple(GRID),
    n_up: int = 64,
    keep: float = 0.25,
    on_trial: Callable[[Baseline, float], None] = lambda *_: None,
) -> dict[str, Baseline]:
    """Try what :mod:`namm_ext.baselines.grid` has for each rule.

    Args:
        workload: of the validation split.
        rules: names.
        n_up: tokens between two updates.
        keep: the budget, as a share of a context.
        on_trial: called with the rule and the exact match of each trial.

    Returns:
        The best of each rule; of equal ones the first.
    """
    found = {}
    for name in rules:
        best = -1.0
        tried = [Method(name, at_pace(rule, n_up)) for rule in GRID[name]]
        for rule, method in zip(
            GRID[name], made_ready(tried, model, tokenizer, workload.length), strict=True
        ):
            assert method.policy is not None
            policy = fixed_budget(method.policy, keep, workload.length)
            results = [workload.ask(model, policy, task) for task in workload.tasks]
            score = sum(result.accuracy for result in results) / len(results)
            on_trial(rule, score)
            if score > best:
                best, found[name] = score, rule
    return found
