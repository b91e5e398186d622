"""What is compared: a memory by name, and the published rules as each model likes them best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from ..baselines import Baseline, ExpectedAttention, SnapKV
from ..baselines.grid import GRID
from ..budget import Budget
from ..fitting.calibrate import calibrate, targets_of
from ..fitting.importance import Text
from ..fitting.texts import repeated
from ..policy import Policy
from ..policy.base import PolicyT
from ..tasks.suite import fit_texts
from .results import FULL

#: Models without a file of their own in ``zoo/tuned`` take the settings found on this one.
DEFAULT_TUNED = "smollm2-135m"


RULES: dict[str, type[Baseline]] = {name: type(tried[0]) for name, tried in GRID.items()}
"""All published rules by name."""


@dataclass(frozen=True)
class Method:
    """A memory by name; None is the stock cache, which keeps everything."""

    name: str
    policy: Policy | None

    @property
    def settings(self) -> dict[str, Any]:
        """What defines it, as plain values."""
        if self.policy is None:
            return {}
        return {"fingerprint": self.policy.fingerprint(), **self.policy.to_dict()}


def full_method() -> Method:
    """The stock cache."""
    return Method(FULL, None)


def fixed_budget(policy: PolicyT, keep: float, length: int) -> PolicyT:
    """The same policy with a fixed budget: a share of a context of ``length`` tokens, per head."""
    budget = replace(policy.budget, size=float(keep))
    return policy.with_budget(budget.of_context(length))


def tuned_rules(model: str) -> dict[str, Baseline]:
    """The settings of every rule that ``namm compare --tune`` found on a model.

    Args:
        model: its name; models without a file have those of `DEFAULT_TUNED`.

    Returns:
        Rules by name: those of the file in its order, then the others as they were published.
        Their budgets have no size yet, they keep all.
    """
    folder = Path(str(resources.files("namm_ext") / "zoo" / "tuned"))
    path = folder / f"{Path(model).name}.json"
    if not path.is_file():
        path = folder / f"{DEFAULT_TUNED}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    tuned = {name: rule_from_dict(name, settings) for name, settings in content.items()}
    return tuned | {name: rule(1.0) for name, rule in RULES.items() if name not in tuned}


def rule_from_dict(name: str, settings: dict[str, Any]) -> Baseline:
    """A rule from its arguments as plain values; the budget without its size."""
    arguments = dict(settings)
    return RULES[name](Budget(1.0, **arguments.pop("budget", {})), **arguments)


def rule_to_dict(rule: Baseline) -> dict[str, Any]:
    """What `rule_from_dict` reads: arguments that are not the default ones."""
    standard = type(rule)(Budget(1.0)).to_dict()
    plain = Budget(1.0).to_dict()
    values = {k: v for k, v in rule.to_dict().items() if k != "budget" and v != standard[k]}
    budget = {k: v for k, v in rule.budget.to_dict().items() if k != "size" and v != plain[k]}
    return {"budget": budget, **values}


def beside(rule: Baseline, memory: Policy) -> Baseline:
    """A rule that updates and divides its budget among the layers as ``memory`` does.

    One whose layers share their budget divides it in its own way.
    """
    paced = at_pace(rule, memory.n_up)
    if paced.budget.scope == "global":
        return paced
    return paced.with_budget(layer_shares=memory.budget.layer_shares)


def at_pace(rule: Baseline, n_up: int) -> Baseline:
    """The same rule with another ``n_up``; SnapKV observes no more than one period."""
    if isinstance(rule, SnapKV):
        return rule.replace(n_up=n_up, window=min(rule.window, n_up))
    return rule.replace(n_up=n_up)


def made_ready(methods: Sequence[Method], model: Any, tokenizer: Any, length: int) -> list[Method]:
    """The methods with what published rules have to know of a model: how its RoPE turns, and a
    calibration if all layers share a budget by the scores of one pass.

    Args:
        length: tokens of the two training texts that they are calibrated on.
    """
    texts: list[Text] = []
    targets: list[Tensor] = []
    done = []
    for method in methods:
        rule = method.policy
        if isinstance(rule, ExpectedAttention):
            rule = rule.for_model(model)
        if isinstance(rule, Baseline) and rule.needs_calibration:
            if not texts:
                contexts = fit_texts(tokenizer, length=length, count=2)
                texts = [repeated(tokenizer, ids) for ids in contexts]
                targets = targets_of(model, texts)
            rule = calibrate(rule, model, texts, targets=targets)
        done.append(replace(method, policy=rule))
    return done


def baseline_methods(
    model: str, memory: Policy, names: Sequence[str] | None = None
) -> list[Method]:
    """Tuned rules beside a memory.

    Args:
        model: the name of the language model.
        memory: as in `beside`.
        names: of the rules; None for all.

    Raises:
        ValueError: if there is no rule of a name.
    """
    rules = tuned_rules(model)
    for name in names or ():
        if name not in rules:
            raise ValueError(f"--method must be one of {', '.join(rules)}, got {name!r}")
    chosen = [(name, beside(rules[name], memory)) for name in (rules if names is None else names)]
    return [Method(f"{name} (2x)" if rule.two_passes else name, rule) for name, rule in chosen]
