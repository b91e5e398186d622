"""What the baselines have in common: a budget, floors, and a score per token."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..config import check_layer_shares, layer_cache_size
from ..policy import Policy, UpdateContext
from ..policy.base import fingerprint_of, layer_share, select_rows


class Baseline(Policy):
    """A policy that keeps the ``cache_size`` best tokens by a fixed score.

    Ties go to the newer token; the newest token of a head always stays.

    Args:
        cache_size: tokens of each head after an update, at least 1.
        n_up: real tokens between two updates, at least 1.
        budget: ``"per_head"``, or ``"per_layer"``: the heads of a layer share
            ``cache_size * heads`` tokens and compete by score.
        sink_tokens: first tokens of the sequence that always stay.
        recent_tokens: newest tokens that always stay.

    Raises:
        ValueError: if an argument is out of range, or the floors fill the whole budget.
    """

    #: False if scores need no attention: the store then keeps no query window.
    needs_window = True

    def __init__(
        self,
        cache_size: int,
        n_up: int = 64,
        budget: str = "per_head",
        *,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
    ) -> None:
        name = type(self).__name__
        for key, value, low in (
            ("cache_size", cache_size, 1),
            ("n_up", n_up, 1),
            ("sink_tokens", sink_tokens, 0),
            ("recent_tokens", recent_tokens, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: {key} must be an integer >= {low}, got {value!r}")
        if budget not in ("per_head", "per_layer"):
            raise ValueError(f"{name}: budget must be 'per_head' or 'per_layer', got {budget!r}")
        if sink_tokens + recent_tokens > cache_size:
            raise ValueError(
                f"{name}: sink_tokens + recent_tokens must be at most cache_size = {cache_size}, "
                f"got {sink_tokens} + {recent_tokens}"
            )
        self.cache_size = cache_size
        self.n_up = n_up
        self.budget = budget
        self.layer_shares: tuple[float, ...] | None = None
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens

    def score(self, ctx: UpdateContext) -> Tensor:
        """``[C]``: higher stays longer. Rows that are not live may hold anything."""
        raise NotImplementedError

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Scores, and the state as it was."""
        return self.score(ctx), ctx.state

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """The best ``cache_size`` tokens and the floors."""
        share = layer_share(self.layer_shares, ctx)
        return select_rows(
            scores,
            ctx,
            cache_size=layer_cache_size(self.cache_size, share),
            budget=self.budget,
            sink_tokens=self.sink_tokens,
            recent_tokens=math.floor(self.recent_tokens * min(share, 1.0)),
        )

    def with_layer_shares(self, layer_shares: tuple[float, ...] | None) -> Baseline:
        """The same rule with the budget divided among the layers as a `NAMMConfig` says.

        A layer with less than an equal part keeps proportionally fewer recent tokens.

        Raises:
            ValueError: unless ``layer_shares`` is None or positive numbers with mean 1.
        """
        if layer_shares is not None:
            check_layer_shares(type(self).__name__, layer_shares)
        other = copy.copy(self)
        other.layer_shares = layer_shares
        return other

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(vars(self))

    def fingerprint(self) -> str:
        """Hash of name and settings."""
        return fingerprint_of(self, self.settings(), [])

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({arguments})"


def live_rows(ctx: UpdateContext) -> tuple[Tensor, Tensor]:
    """Row numbers of all live tokens and the segment of each, int64, in order."""
    used = ctx.seqused_k.long()
    segment = torch.repeat_interleave(torch.arange(used.numel(), device=used.device), used)
    before = (used.cumsum(0) - used)[segment]
    offset = torch.arange(segment.numel(), device=used.device) - before
    return ctx.cu_seqlens_k[:-1].long()[segment] + offset, segment


def newest_position(ctx: UpdateContext) -> Tensor:
    """``[S]`` int64 position of each segment's newest token."""
    last = ctx.cu_seqlens_k[:-1].long() + (ctx.seqused_k.long() - 1).clamp(min=0)
    return ctx.pos[last].long()
