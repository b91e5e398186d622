"""Rules that look at the attention tokens received, recomputed from the window's queries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..budget import Budget
from ..policy import UpdateContext
from ..ragged import CARRY
from ._base import Baseline


def received(ctx: UpdateContext, num_queries: int) -> Tensor:
    """``[C]`` attention received from the newest ``num_queries`` queries, mean over a group."""
    window = ctx.window
    # The op wants a multiple of 16 rows; rows in front are not counted, so they may be anything.
    missing = -window.q.shape[2] % CARRY
    if missing:
        window = window._replace(
            q=torch.nn.functional.pad(window.q, (0, 0, missing, 0)),
            lse=torch.nn.functional.pad(window.lse, (missing, 0)),
            pos_q=window.pos_q - missing,
        )
    return ops.attention_received(
        window,
        ctx.segments,
        softmax_scale=ctx.softmax_scale,
        first_row=window.q.shape[2] - num_queries,
        softcap=ctx.softcap,
    )


class H2O(Baseline):
    """Heavy hitters: the tokens with the largest attention accumulated over the sequence.

    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models" (arXiv:2306.14048): half of the budget goes to heavy hitters, half to the
    newest tokens. Deviations: query heads that share a KV head are averaged (the paper has no
    groups); where heads share a budget they share the heavy-hitter half.

    Args:
        budget, n_up: as in ``Baseline``.

    Example:
        >>> H2O(256).budget
        Budget(256, recent_tokens=0.5)
    """

    num_state = 1
    published: ClassVar[dict[str, Any]] = {"recent_tokens": 0.5}

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """The accumulated attention, which is also the state."""
        old = ctx.segments.state
        state = old + received(ctx, self.n_up).to(old.dtype)[:, None]
        return state[:, 0].contiguous(), state


class SnapKV(Baseline):
    """Attention from the newest queries, smoothed over neighbouring tokens.

    Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation"
    (arXiv:2404.14469): attention of an observation window to the tokens before it, average-pooled
    along the sequence; the window itself stays. Deviations: applied at every update instead of
    once after the prompt; neighbours are neighbours in the cache; query heads of a group are
    averaged.

    Args:
        budget, n_up: as in ``Baseline``.
        window: queries of the observation window, at most ``16 + n_up``; its tokens stay as far as
            the budget has room. Default 32, or less: half of a budget in tokens, or ``16 + n_up``.
        kernel_size: odd width of the pooling; 1 for none.

    Example:
        >>> SnapKV(256).window
        32
    """

    def __init__(
        self,
        budget: Budget | int | float,
        n_up: int = 64,
        *,
        window: int | None = None,
        kernel_size: int = 5,
    ) -> None:
        super().__init__(budget, n_up)
        if window is None:
            size = self.budget.size
            window = min(32, CARRY + n_up, max(1, size // 2) if isinstance(size, int) else 32)
        if not 1 <= window <= CARRY + n_up:
            raise ValueError(f"SnapKV: window must be in [1, 16 + n_up], got {window}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"SnapKV: kernel_size must be odd and positive, got {kernel_size}")
        self.window = self.min_recent = window
        self.kernel_size = kernel_size

    def score(self, ctx: UpdateContext) -> Tensor:
        """Pooled attention; the window's own tokens count neither as received nor as neighbours."""
        store = ctx.segments
        attention = received(ctx, self.window).to(store.state.dtype)
        rows, segment = store.live_rows()
        observed = store.pos[rows] <= store.newest()[segment] - self.window
        rows, segment = rows[observed], segment[observed]
        scores = torch.zeros_like(attention)
        for shift in range(-(self.kernel_size // 2), self.kernel_size // 2 + 1):
            index = torch.arange(rows.numel(), device=rows.device) + shift
            inside = (index >= 0) & (index < rows.numel())
            index = index.clamp(0, max(rows.numel() - 1, 0))
            inside &= segment[index] == segment
            scores[rows] += torch.where(inside, attention[rows[index]], 0.0)
        return scores / self.kernel_size


class TOVA(Baseline):
    """Attention of the newest query alone: the token it looks at least goes first.

    Oren et al. 2024, "Transformers are Multi-State RNNs" (arXiv:2401.06104), where the scores are
    averaged over the heads of a layer, so that all heads keep the same tokens. Deviation: with
    ``n_up > 1`` several tokens go at once, by the last query's attention.

    Args:
        budget, n_up: as in ``Baseline``.
        heads: ``"layer"`` as published, ``"head"`` for every KV head by itself. Heads that share a
            budget compete, so there it is every head by itself.

    Example:
        >>> TOVA(256).averages_heads, TOVA(Budget(256, scope="per_layer")).averages_heads
        (True, False)
    """

    def __init__(
        self, budget: Budget | int | float, n_up: int = 64, *, heads: str = "layer"
    ) -> None:
        super().__init__(budget, n_up)
        if heads not in ("layer", "head"):
            raise ValueError(f"TOVA: heads must be 'layer' or 'head', got {heads!r}")
        self.heads = heads

    @property
    def averages_heads(self) -> bool:
        """Whether the heads of a layer have the same scores."""
        return self.heads == "layer" and self.budget.scope == "per_head"

    @property
    def couples_heads(self) -> bool:
        """Also where scores are means over heads."""
        return self.averages_heads or super().couples_heads

    def _earlier_settings(self) -> dict[str, Any]:
        return {**self.settings(), "heads": "layer" if self.averages_heads else "head"}

    def score(self, ctx: UpdateContext) -> Tensor:
        """Attention of the last query."""
        attention = received(ctx, 1).to(ctx.segments.state.dtype)
        if not self.averages_heads:
            return attention
        # The heads of a row keep the same positions, so their rows match one to one.
        rows, segment = ctx.segments.live_rows()
        used = ctx.segments.seqused_k.long()
        start = (used.cumsum(0) - used)[segment]
        rank = torch.arange(rows.numel(), device=rows.device) - start
        first_head = segment - segment % ctx.num_kv_heads
        slot = (used.cumsum(0) - used)[first_head] + rank
        total = attention.new_zeros(rows.numel()).index_add_(0, slot, attention[rows])
        scores = torch.zeros_like(attention)
        scores[rows] = total[slot] / ctx.num_kv_heads
        return scores
