"""Rules that look at positions only, and the rule that drops nothing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..policy import UpdateContext
from ._base import Baseline


class StreamingLLM(Baseline):
    """Attention sinks and a sliding window: the first ``sink_tokens`` and the newest rest.

    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"
    (arXiv:2309.17453). Deviation: the paper re-rotates keys to their rank in the cache; here they
    keep their original positions, as in a full cache. Sharing among the heads of a layer changes
    nothing.

    Example:
        >>> StreamingLLM(256).budget
        Budget(256, sink_tokens=4)
    """

    needs_window = False
    published: ClassVar[dict[str, Any]] = {"sink_tokens": 4}

    def score(self, ctx: UpdateContext) -> Tensor:
        """The position: newer is better. Exact in float32 up to 2^24 tokens."""
        return ctx.segments.pos.to(ctx.segments.state.dtype)


class Random(Baseline):
    """A uniform random sample of the sequence, the control experiment of every comparison.

    Each (seed, layer, head, position) has a fixed random priority, so the sample depends neither
    on how the sequence was fed nor on the other rows of a batch.
    """

    needs_window = False

    def __init__(self, budget: Budget | int | float, n_up: int = 64, *, seed: int = 0) -> None:
        super().__init__(budget, n_up)
        self.seed = seed

    def score(self, ctx: UpdateContext) -> Tensor:
        """A hash of seed, layer, head and position, uniform in [0, 1)."""
        rows, segment = ctx.segments.live_rows()
        head = segment % ctx.num_kv_heads
        x = torch.full_like(head, self.seed)
        for part in (ctx.layer_idx, head, ctx.segments.pos[rows].long()):
            x = _mix(x + part)
        scores = ctx.segments.state.new_zeros(ctx.segments.capacity)
        scores[rows] = ((x >> 8) & 0xFFFFFF).to(scores.dtype) / 2**24
        return scores


def _mix(x: Tensor) -> Tensor:
    """Finaliser of splitmix32 in the low 32 bits of an int64; + golden ratio, so 0 moves too."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


class NeverEvict(Baseline):
    """Keeps everything, whatever the budget: the full cache on the ragged store."""

    needs_window = False

    def __init__(self, n_up: int = 64) -> None:
        super().__init__(Budget(), n_up)

    def score(self, ctx: UpdateContext) -> Tensor:
        """Zero for all."""
        return ctx.segments.state.new_zeros(ctx.segments.capacity)

    def with_budget(self, budget: Budget | None = None, **changes: Any) -> NeverEvict:
        """Itself."""
        del budget, changes
        return self


#: The name under which tables show it.
Full = NeverEvict
