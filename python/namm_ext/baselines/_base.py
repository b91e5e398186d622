"""What the baselines have in common: a budget, and a score per token."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..budget import Budget, is_int
from ..policy import Policy, UpdateContext
from ..policy.base import as_budget, hash_of

BaselineT = TypeVar("BaselineT", bound="Baseline")


class Baseline(Policy):
    """A policy that ranks tokens by a fixed score.

    Ties go to the newer token; the newest token of a head always stays.

    Args:
        budget: how much stays. A bare size is a :class:`~namm_ext.Budget` with the floors that the
            rule was published with (``published``); a ``Budget`` is taken as it is.
        n_up: real tokens between two updates, at least 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    #: False if scores need no attention: the store then keeps no query window.
    needs_window = True
    #: Fields of the budget that belong to the rule as published.
    published: ClassVar[dict[str, Any]] = {}

    def __init__(self, budget: Budget | int | float, n_up: int = 64) -> None:
        if not is_int(n_up) or n_up < 1:
            raise ValueError(
                f"{type(self).__name__}: n_up must be an int of at least 1, got {n_up!r}"
            )
        self.budget = as_budget(budget, **self.published)
        self.n_up = n_up

    def score(self, ctx: UpdateContext) -> Tensor:
        """``[C]``: higher stays longer. Rows that are not live may hold anything."""
        raise NotImplementedError

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Scores, and the state as it was."""
        return self.score(ctx), ctx.segments.state

    @property
    def needs_calibration(self) -> bool:
        """Whether all layers share the budget by scores that nothing makes comparable yet."""
        return self.budget.scope == "global" and not (self.calibration or self.two_passes)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def replace(self: BaselineT, **changes: Any) -> BaselineT:
        """The same rule with other arguments, checked again.

        Example:
            >>> from namm_ext.baselines import KNorm
            >>> KNorm(256).replace(n_up=16)
            KNorm(budget=Budget(256), n_up=16)
        """
        other = type(self)(**{**self.settings(), **changes})
        return other.with_calibration(self.calibration)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        return {**self.settings(), "budget": self.budget.to_dict()}

    def earlier_fingerprints(self) -> tuple[str, ...]:
        """In version 1 the fields of the budget stood among the others, and floors were tokens."""
        size = self.budget.size or 1  # what a rule without a limit had
        if self.calibration is not None or not isinstance(size, int):
            return ()
        flat = {
            **self._earlier_settings(),
            "cache_size": size,
            "budget": self.budget.scope,
            "layer_shares": self.budget.layer_shares,
            "sink_tokens": self.budget.sink_tokens,
            "recent_tokens": max(self.budget.floors(size)[1], self.min_recent),
        }
        return (hash_of(self, flat, []),)

    def _earlier_settings(self) -> dict[str, Any]:
        return self.settings()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({arguments})"
