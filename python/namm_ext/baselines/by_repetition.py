"""The rule that reads a context twice, and keeps what the second reading looks at."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget, whole_tokens
from ..policy import UpdateContext
from ..policy.base import Room
from ._base import Baseline


class KVzip(Baseline):
    """Keeps what a model looks at while it repeats its context. Two passes.

    Kim et al. 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    (arXiv:2505.23416): the model reads the context, is asked to repeat it and reads it again. The
    importance of a token is the largest softmax weight from any query of the second reading and any
    query head of the group. At the end of the context the best tokens of all layers and heads stay,
    once; whatever comes later stays. Deviations: the context is repeated as a whole, not in pieces
    of 2,000 tokens, and the softmax is over all tokens.

    It serves one context: ``for_context`` reads it and gives the rule that has the weights. Its
    cache holds the whole context until its end (``n_up`` is the length), so that peak memory is
    that of a full cache.

    Args:
        budget, n_up: as in ``Baseline``. A size is a part of the context. Scope "global" needs no
            calibration: weights of layers and heads compare as they are.

    Example:
        >>> KVzip(0.25).budget
        Budget(0.25, scope='global', sink_tokens=4)
    """

    needs_window = False
    two_passes = True
    published: ClassVar[dict[str, Any]] = {"scope": "global", "sink_tokens": 4}

    def __init__(self, budget: Budget | int | float, n_up: int = 64) -> None:
        super().__init__(budget, n_up)
        self.weights: dict[int, Tensor] = {}

    def for_context(self, model: Any, tokenizer: Any, ids: Sequence[int]) -> KVzip:
        """The rule for one context, which the model reads twice; what opens a chat once."""
        from ..fitting import read_twice, repeated

        readings = read_twice(model, repeated(tokenizer, ids))
        return self.with_weights({layer.layer_idx: layer.importance for layer in readings})

    def with_weights(self, weights: Mapping[int, Tensor]) -> KVzip:
        """The rule for a context whose weights are known.

        Args:
            weights: ``[H, T]`` of each layer with a memory.
        """
        other = copy.copy(self)
        other.weights = dict(weights)
        other.n_up = next(iter(weights.values())).shape[1]
        return other

    def room(self, layer_idx: int, seen: int) -> Room:
        """The budget's at the end of the context, no limit later."""
        if not self.weights:
            return super().room(layer_idx, seen)
        if seen != self.n_up:
            return Room(None, 0, 0)
        if self.budget.scope != "global":
            return super().room(layer_idx, seen)
        size = self.budget.size
        assert isinstance(size, int | float)  # a Budget and the store make sure
        tokens = whole_tokens(size * seen) if isinstance(size, float) else min(size, seen)
        sinks, recent = self.budget.floors(tokens)
        ranked = torch.stack(list(self.weights.values()))  # [L, H, T]
        ranked[..., :sinks] = torch.inf
        ranked[..., seen - max(recent, 1) :] = torch.inf
        best = ranked.flatten().topk(tokens * ranked[..., 0].numel()).indices
        mine = best // ranked[0].numel() == list(self.weights).index(layer_idx)
        limit = whole_tokens(float(mine.sum()) / ranked.shape[1])
        return Room(limit, *self.budget.floors(limit))

    def score(self, ctx: UpdateContext) -> Tensor:
        """The weights; 0 for tokens behind the context.

        Raises:
            ValueError: if no context was read.
        """
        if not self.weights:
            raise ValueError(
                "KVzip: weights must be those of the context, got none; use "
                "policy.for_context(model, tokenizer, ids)"
            )
        store, weights = ctx.segments, self.weights[ctx.layer_idx]
        rows, segment = store.live_rows()
        pos = store.pos[rows].long()
        inside = pos < weights.shape[1]
        rows, head, pos = rows[inside], segment[inside] % ctx.num_kv_heads, pos[inside]
        scores = store.state.new_zeros(store.capacity)
        scores[rows] = weights.to(scores)[head, pos]
        return scores

    def to(self, device: torch.device | str) -> KVzip:
        """The same with its weights on ``device``; itself if they are there."""
        moved = super().to(device)
        weights = {layer: w.to(device) for layer, w in self.weights.items()}
        if all(w is weights[layer] for layer, w in self.weights.items()):
            return moved
        return moved.with_weights(weights)

    def tensors(self) -> dict[str, Tensor]:
        """The weights, too."""
        weights = {f"weights.{layer}": w for layer, w in self.weights.items()}
        return {**super().tensors(), **weights}
