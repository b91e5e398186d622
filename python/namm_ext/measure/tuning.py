"""The settings of each baseline that answer most questions of the validation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..baselines import Baseline
from ..budget import Budget
from .methods import RULES, at_pace, fixed_budget
from .workloads import Workload

# Fields of the budget and arguments of a rule, with the values that are tried. Every rule may keep
# first tokens and a part for the newest ones: that often decides more than the rule.
_FLOORS: dict[str, tuple[Any, ...]] = {
    "sink_tokens": (4, 0),
    "recent_tokens": (0.25, 0.0, 0.5, 0.75),
}
_COMMON: dict[str, tuple[Any, ...]] = {**_FLOORS, "scope": ("per_head", "per_layer")}
_OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "StreamingLLM": {"sink_tokens": (4, 1, 16)},  # it keeps the newest in any case
    "H2O": {**_COMMON, "recent_tokens": (0.5, 0.25, 0.75, 0.9)},
    "SnapKV": {**_COMMON, "window": (64, 16, 32), "kernel_size": (5, 1, 9, 17, 33)},
    "Random": _FLOORS,
}


def options_of(rule: str) -> dict[str, tuple[Any, ...]]:
    """What is tried for a rule, by field of the budget or argument; the first is the start."""
    return _OWN.get(rule, _COMMON)


def tune(
    model: Any,
    workload: Workload,
    *,
    rules: tuple[str, ...] = tuple(RULES),
    n_up: int = 64,
    keep: float = 0.25,
    layer_shares: tuple[float, ...] | None = None,
    on_trial: Callable[[Baseline, float], None] = lambda *_: None,
) -> dict[str, Baseline]:
    """Set one thing after the other to the value that answers most questions.

    Args:
        workload: of the validation split.
        rules: names.
        n_up: tokens between two updates.
        keep: the budget, as a share of a context.
        layer_shares: how the memory they are compared with divides its budget among the layers;
            each baseline may do the same or give every layer an equal part.
        on_trial: called with the rule and the exact match of each trial.

    Returns:
        The best of each rule; of equal ones the first. Their budgets have no size yet.
    """
    found = {}
    for name in rules:
        options = dict(options_of(name))
        if layer_shares:
            options["layer_shares"] = (None, layer_shares)
        best = {option: values[0] for option, values in options.items()}
        best_score = -1.0
        tried: set[str] = set()
        for option, values in options.items():
            for value in values:
                settings = {**best, option: value}
                rule = make_rule(name, settings)
                if repr(rule) in tried:
                    continue
                tried.add(repr(rule))
                policy = fixed_budget(at_pace(rule, n_up), keep, workload.length)
                results = [workload.ask(model, policy, task) for task in workload.tasks]
                score = sum(result.accuracy for result in results) / len(results)
                on_trial(rule, score)
                if score > best_score:
                    best_score, best = score, settings
        found[name] = make_rule(name, best)
    return found


def make_rule(name: str, settings: dict[str, Any]) -> Baseline:
    """A rule from fields of its budget and its own arguments together."""
    of_budget = {field.name for field in fields(Budget)} & settings.keys()
    own = {key: value for key, value in settings.items() if key not in of_budget}
    return RULES[name](Budget(1.0, **{key: settings[key] for key in of_budget}), **own)
