"""How important is a cached token? What a second reading attends to (spec 12.3).

The model reads a text, and then something that makes it look back: the same text once more after a
request to repeat it (KVzip, Kim et al. 2025, arXiv:2505.23416), or questions about it. Nothing is
evicted. The importance of a token of the text is the largest softmax weight that any later query
gives it. It is the target of all fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import NAMMCache, borrow, cache_keyword
from ..policy import Policy, UpdateContext
from ..reference import soft_cap

#: Added to importance before its logarithm is taken.
IMPORTANCE_EPS = 1e-4
#: Queries whose attention is looked at together; bounds memory, changes nothing.
_QUERIES = 256


@dataclass(frozen=True)
class Later:
    """What follows a text and looks back at it.

    Attributes:
        ids: token ids.
        weight: what its attention counts, positive.
    """

    ids: tuple[int, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.ids or not self.weight > 0:
            raise ValueError(
                f"Later: ids must not be empty and weight must be positive, got "
                f"{len(self.ids)} ids and weight {self.weight}"
            )


@dataclass(frozen=True)
class Text:
    """A text that a memory is fitted to.

    Attributes:
        ids: token ids, what opens a chat included.
        later: what looks back at them, each as if it were the only one; at least one.
    """

    ids: tuple[int, ...]
    later: tuple[Later, ...]

    def __post_init__(self) -> None:
        if not self.ids or not self.later:
            raise ValueError(
                f"Text: ids and later must not be empty, got {len(self.ids)} and {len(self.later)}"
            )


@dataclass(frozen=True)
class LayerReading:
    """What one layer held after the first reading, and how important each token was.

    Attributes:
        layer_idx: of the layer.
        k: ``[H, T, D]`` keys after RoPE.
        v: ``[H, T, Dv]`` values.
        importance: ``[H, T]``, in [0, 1] if all weights are 1.
    """

    layer_idx: int
    k: Tensor
    v: Tensor
    importance: Tensor

    @property
    def target(self) -> Tensor:
        """``[H, T]`` log(importance + 1e-4)."""
        return (self.importance + IMPORTANCE_EPS).log()


class _LookingBack(Policy):
    """Evicts nothing; its one update, after ``n_up`` tokens, finds for each of the first ``first``
    tokens the largest attention from the others."""

    num_state = 1

    def __init__(self, first: int, num_tokens: int) -> None:
        self.first, self.n_up = first, num_tokens

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """The attention as scores and as state."""
        segments, window = ctx.segments, ctx.window
        state = torch.zeros_like(segments.state)
        groups = window.q.shape[1] // ctx.num_kv_heads
        rows = window.q.shape[2]
        start = rows - (self.n_up - self.first)
        for h, slot in enumerate(segments.slices()):
            early = slice(slot.start, slot.start + self.first)
            k = segments.k[early].to(state.dtype)
            heads = slice(h * groups, (h + 1) * groups)
            for begin in range(start, rows, _QUERIES):
                part = slice(begin, min(begin + _QUERIES, rows))
                q = window.q[0, heads, part].to(state.dtype)
                lse = window.lse[0, heads, part, None].to(state.dtype)
                logits = soft_cap(q @ k.T * ctx.softmax_scale, ctx.softcap)
                received = (logits - lse).exp().amax((0, 1))
                state[early, 0] = torch.maximum(state[early, 0], received)
        return state[:, 0].contiguous(), state

    def to_dict(self) -> dict[str, Any]:
        """Where the second reading begins and ends."""
        return {"first": self.first, "num_tokens": self.n_up}


@torch.inference_mode()
def read_twice(model: Any, text: Text) -> list[LayerReading]:
    """Let a model read a text, and then each of its ``later``.

    Args:
        model: a causal language model of transformers.
        text: what to read.

    Returns:
        One :class:`LayerReading` for each layer with a memory, of all ``T = len(text.ids)``
        tokens, on the device of the model.
    """
    readings: list[LayerReading] = []
    for later in text.later:
        found = _read(model, text.ids, later)
        if readings:
            for new, old in zip(found, readings, strict=True):
                torch.maximum(old.importance, new.importance, out=old.importance)
        else:
            readings = found
    return readings


def _read(model: Any, ids: Sequence[int], later: Later) -> list[LayerReading]:
    policy = _LookingBack(len(ids), len(ids) + len(later.ids))
    with borrow(model):
        cache = NAMMCache(model, policy)
        given = {cache_keyword(model.base_model): cache}
        for part in (ids, later.ids):
            model.base_model(torch.tensor([part], device=model.device), **given, use_cache=True)
    readings = []
    for layer in cache.memory_layers:
        assert layer.kv is not None
        segments = layer.kv.store.segments.with_values
        rows = [slice(r.start, r.start + len(ids)) for r in segments.slices()]
        k, v, state = (
            torch.stack([tensor[r] for r in rows])
            for tensor in (segments.k, segments.v, segments.state)
        )
        readings.append(LayerReading(layer.layer_idx, k, v, later.weight * state[..., 0]))
    return readings
