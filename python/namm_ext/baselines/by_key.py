"""Rules that look at keys and values only: no attention is recomputed, no window is kept."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..policy import UpdateContext
from ._base import Baseline


class KNorm(Baseline):
    """Keeps the keys of small L2 norm.

    Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (arXiv:2406.11430). RoPE does not change norms, so cached keys are as good as the paper's.
    Deviation: the paper leaves its first two layers whole; here every layer has the same budget.
    """

    needs_window = False

    def score(self, ctx: UpdateContext) -> Tensor:
        """Minus the norm."""
        return -ctx.segments.k.to(ctx.segments.state.dtype).norm(dim=-1)


class KeyDiff(Baseline):
    """Keeps the keys that differ most from the average direction of their head's keys.

    Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments" (arXiv:2504.15364): the anchor is the mean of
    the normalised keys, the score minus the cosine to it. Keys are compared after RoPE, as cached.
    """

    needs_window = False

    def score(self, ctx: UpdateContext) -> Tensor:
        """Minus the cosine similarity to the anchor."""
        store = ctx.segments
        rows, segment = store.live_rows()
        keys = store.k[rows].to(store.state.dtype)
        unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        anchor = unit.new_zeros(store.seqused_k.numel(), unit.shape[1])
        anchor.index_add_(0, segment, unit)  # the sum: its length does not change the cosine
        anchor = anchor / anchor.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scores = unit.new_zeros(store.pos.shape)
        scores[rows] = -(unit * anchor[segment]).sum(dim=-1)
        return scores


class NestedKeyDiff(Baseline):
    """KeyDiff on three scales: keys that stand out in the whole, in their block, in what precedes.

    After Chen et al. 2026, "NestedKV: Nested Memory Routing for Long-Context KV Cache Compression"
    (arXiv:2605.26678): tokens are ranked by one minus the cosine of their key to the mean direction
    of all keys, of their block and of a sliding window; the rankings are combined. Deviations: the
    three count alike (the paper mixes them per head and routes surprising tokens), and shares of
    heads are the budget's affair.

    Args:
        budget, n_up: as in ``Baseline``.
        block: positions of a block.
        window: tokens of the sliding window, the token itself and those kept before it.

    Example:
        >>> NestedKeyDiff(256, block=128)
        NestedKeyDiff(budget=Budget(256), n_up=64, block=128, window=32)
    """

    needs_window = False

    def __init__(
        self,
        budget: Budget | int | float,
        n_up: int = 64,
        *,
        block: int = 64,
        window: int = 32,
    ) -> None:
        super().__init__(budget, n_up)
        for name, value in (("block", block), ("window", window)):
            if value < 1:
                raise ValueError(f"NestedKeyDiff: {name} must be at least 1, got {value}")
        self.block, self.window = block, window

    def score(self, ctx: UpdateContext) -> Tensor:
        """Mean rank over the three scales, in [0, 1)."""
        store = ctx.segments
        scores = store.state.new_zeros(store.capacity)
        for rows in store.slices():
            keys = store.k[rows].to(scores.dtype)
            unit = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-12)
            block = store.pos[rows].long() // self.block
            blocks = unit.new_zeros(int(block.max()) + 1, unit.shape[1]) if len(unit) else unit
            running = torch.nn.functional.pad(unit.cumsum(0), (0, 0, 1, 0))
            first = (torch.arange(len(unit), device=unit.device) - self.window + 1).clamp(min=0)
            # Sums, not means: their lengths do not change the cosine.
            anchors = (
                unit.sum(0, keepdim=True),
                blocks.index_add(0, block, unit)[block],
                running[1:] - running[first],
            )
            for anchor in anchors:
                cosine = torch.cosine_similarity(unit, anchor, dim=1, eps=1e-12)
                scores[rows] += _rank(-cosine)
            scores[rows] /= 3 * max(len(unit), 1)
        return scores


class LagKV(Baseline):
    """Keeps, of each partition, the tokens whose keys and values vary most against the next one.

    Liang et al. 2025, "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
    Important" (arXiv:2504.04704): after the sinks the sequence is cut into partitions of ``lag``
    tokens. Channels are scaled by minimum and maximum over the next partition; a token scores the
    mean, over key and value, of the softmax over its partition of its standard deviation over
    channels; it counts by its rank within the partition. Sinks and what has no complete partition
    behind it rank first. Deviations: a token is ranked once, when that partition is complete, and
    later evictions go by this rank; where the budget has already thinned a partition, what is left
    of it counts (of the next one: or the partition itself, if nothing is).

    Args:
        budget, n_up: as in ``Baseline``. Partitions begin behind the sinks.
        lag: tokens of a partition; as many newest tokens stay as far as the budget has room.
            Default 128, or less: a quarter of a budget in tokens.

    Example:
        >>> LagKV(256).lag, LagKV(0.25).lag
        (64, 128)
    """

    needs_window = False
    num_state = 1
    published: ClassVar[dict[str, Any]] = {"sink_tokens": 4}

    def __init__(
        self, budget: Budget | int | float, n_up: int = 64, *, lag: int | None = None
    ) -> None:
        super().__init__(budget, n_up)
        if lag is None:
            size = self.budget.size
            lag = min(128, max(1, size // 4)) if isinstance(size, int) else 128
        if lag < 1:
            raise ValueError(f"LagKV: lag must be at least 1, got {lag}")
        self.lag = self.min_recent = lag

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Ranks in [0, 1), 1 for tokens without one; the state is the score less 1."""
        store = ctx.segments
        state = store.state.clone()
        for s, rows in enumerate(store.slices()):
            b = s // ctx.num_kv_heads
            after_sinks = store.pos[rows].long() - self.budget.sink_tokens
            partition = after_sinks.div(self.lag, rounding_mode="floor")
            complete = (ctx.seen[b] - self.budget.sink_tokens) // self.lag
            waiting = (partition >= 0) & (partition < complete - 1) & (state[rows, 0] == 0)
            if not ctx.due[b] or not waiting.any():
                continue
            k, v = (t[rows].to(state.dtype) for t in (store.k, store.v))
            for number in partition[waiting].unique().tolist():
                mine, following = partition == number, partition == number + 1
                lag = following if following.any() else mine
                of_k, of_v = (_variation(x[mine], x[lag]).softmax(0) for x in (k, v))
                state[rows, 0][mine] = _rank(of_k + of_v) / int(mine.sum()) - 1
        return 1 + state[:, 0], state


def _variation(x: Tensor, reference: Tensor) -> Tensor:
    """``[N]`` standard deviation over channels, scaled to the range of the reference."""
    low, high = reference.amin(0), reference.amax(0)
    return ((x - low) / (high - low).clamp(min=1e-12)).std(1)


def _rank(x: Tensor) -> Tensor:
    """How many come before each in ascending order; equal ones in the order they stand in."""
    return x.argsort(stable=True).argsort().to(x.dtype)
