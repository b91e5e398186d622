"""Settings as version 1 wrote them: the budget was a part of the config, under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..budget import Budget
from ..config import NAMMConfig

_BUDGET = (
    *("selection", "threshold", "cache_size", "budget", "layer_shares"),
    *("protect_newest", "sink_tokens", "recent_tokens"),
)


def split_config(values: Mapping[str, Any]) -> tuple[NAMMConfig, Budget]:
    """Config and budget out of one flat mapping.

    Raises:
        TypeError: if ``values`` is not a mapping.
        ValueError: for an unknown key or a value outside its range.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"NAMMConfig: values must be a mapping, got {type(values).__name__}")
    config = NAMMConfig.from_dict({k: v for k, v in values.items() if k not in _BUDGET})
    budget = {"threshold": 0.0, **{k: v for k, v in values.items() if k in _BUDGET}}
    if budget.get("selection") == "reference":
        budget["selection"] = "original"
    # "global" was a threshold, with a limit for each head.
    scope = budget.pop("budget", "per_head")
    budget["scope"] = "per_head" if scope == "global" else scope
    return config, Budget(size=budget.pop("cache_size", None), **budget)


def flat_budget(budget: Budget) -> dict[str, Any]:
    """The fields of a budget under their names of version 1."""
    values = budget.to_dict()
    values["cache_size"], values["budget"] = values.pop("size"), values.pop("scope")
    if budget.selection == "original":
        values["selection"] = "reference"
    return values
