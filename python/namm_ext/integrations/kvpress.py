"""kvpress both ways: a press of kvpress as a policy on our store, and a policy of ours as a press.

kvpress (https://github.com/NVIDIA/kvpress) scores a prompt's tokens once and keeps the same number
in every head, or masks what heads drop. :class:`PressPolicy` takes its scores to a store that frees
the bytes, during decoding too, and to every :class:`~namm_ext.Budget`. :class:`NAMMPress` goes the
other way, for code that is written around presses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..baselines import Baseline
from ..budget import Budget
from ..policy import Policy, UpdateContext
from ..ragged import Planner, RaggedKV
from ..reference import soft_cap

# Presses that divide by the number of all queries, of which a store has the newest alone.
_WHOLE_PROMPT = ("ObservedAttentionPress",)


class PressPolicy(Baseline):
    """A ``ScorerPress`` of kvpress as a policy; its ``compression_ratio`` is not asked.

    The press sees what the store has: at every update keys and values of the live tokens of a row,
    and the attention of the newest ``n_up`` queries where it wants weights (SnapKV, TOVA). While
    the heads of a row hold equally many tokens it sees them together, otherwise each with its own
    group of queries. Presses that need hidden states (ExpectedAttention) or the whole prompt's
    attention (ObservedAttention) are refused.

    Args:
        press: a ``kvpress.ScorerPress``.
        budget, n_up: as in ``Baseline``; a bare size has no floors.

    Raises:
        ValueError: if the press cannot score keys, values and the window's attention alone.

    Example:
        With kvpress installed, a quarter of the cache by KeyDiff, freed while reading::

            policy = PressPolicy(kvpress.KeyDiffPress(), 0.25)
            model.generate(ids, cache=NAMMCache(model, policy))
    """

    def __init__(self, press: Any, budget: Budget | int | float, n_up: int = 64) -> None:
        super().__init__(budget, n_up)
        self.press = press
        _check_press(press, n_up)

    def score(self, ctx: UpdateContext) -> Tensor:
        """The press' scores; rows of which nothing has to go are not scored."""
        store = ctx.segments
        scores = torch.zeros(store.capacity, dtype=torch.float32, device=store.k.device)
        rows, heads = store.slices(), ctx.num_kv_heads
        for b, due in enumerate(ctx.due):
            own = rows[b * heads : (b + 1) * heads]
            lengths = [part.stop - part.start for part in own]
            if not due or self._all_fit(ctx, b, lengths):
                continue
            together = len(set(lengths)) == 1
            for part in [range(heads)] if together else [range(h, h + 1) for h in range(heads)]:
                found = self._ask(ctx, b, [own[h] for h in part], part)
                for h, values in zip(part, found, strict=True):
                    scores[own[h]] = values.float()
        return scores

    def _all_fit(self, ctx: UpdateContext, row: int, lengths: list[int]) -> bool:
        size = self.room(ctx.layer_idx, ctx.seen[row]).size
        return size is None or (max(lengths) <= size and self.budget.scope == "per_head")

    def _ask(self, ctx: UpdateContext, row: int, own: list[slice], heads: range) -> Tensor:
        """``[heads, T]`` scores of some heads of a row, all of one length."""
        store, window = ctx.segments, ctx.window
        keys, values, positions = (
            torch.stack([t[part] for part in own])[None] for t in (store.k, store.v, store.pos)
        )
        groups = window.q.shape[1] // ctx.num_kv_heads
        queries = slice(heads[0] * groups, (heads[-1] + 1) * groups)
        newest = slice(-min(self.n_up, ctx.seen[row]), None)
        q, lse = (t[row : row + 1, queries, newest].float() for t in (window.q, window.lse))
        last = int(window.pos_q[row]) + window.q.shape[2]
        at = torch.arange(last - q.shape[2], last, device=q.device)
        products = q @ keys.float().repeat_interleave(groups, 1).mT * ctx.softmax_scale
        logits = soft_cap(products, ctx.softcap)
        seen = positions.repeat_interleave(groups, 1)[:, :, None] <= at[:, None]
        attention = torch.where(seen, (logits - lse[..., None]).exp(), 0.0)
        scores: Tensor = _score(self.press, keys, values, attention, ctx.layer_idx)
        return scores[0]

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain values; of the press its class and fields."""
        fields = {name: repr(value) for name, value in vars(self.press).items()}
        press = {"class": type(self.press).__name__, **fields}
        return {**super().to_dict(), "press": press}

    def earlier_fingerprints(self) -> tuple[str, ...]:
        """None: version 1 had no presses."""
        return ()


def _score(press: Any, keys: Tensor, values: Tensor, attention: Tensor, layer_idx: int) -> Tensor:
    """What a press says of ``[1, H, T, D]`` keys, with a module that has nothing but sizes."""
    config = SimpleNamespace(
        num_attention_heads=attention.shape[1], num_key_value_heads=keys.shape[1]
    )
    module = SimpleNamespace(config=config, head_dim=keys.shape[3], layer_idx=layer_idx)
    lengths = keys.new_empty(1, keys.shape[2], 0)  # hidden states without a width
    scores: Tensor = press.score(module, lengths, keys, values, attention, {})
    return scores


def _check_press(press: Any, n_up: int) -> None:
    name = type(press).__name__
    if any(kind.__name__ in _WHOLE_PROMPT for kind in type(press).__mro__):
        raise ValueError(
            f"PressPolicy: press must not need the attention of a whole prompt, as {name} does"
        )
    if not callable(getattr(press, "score", None)):
        raise ValueError(f"PressPolicy: press must be a ScorerPress of kvpress, got {name}")
    window = getattr(press, "window_size", 0)
    if isinstance(window, int) and window > n_up:
        raise ValueError(
            f"PressPolicy: the press' window_size must be at most n_up = {n_up}, got {window}"
        )
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 4 * n_up + 64, 8, generator=draw) for _ in range(2))
    attention = torch.rand(1, 4, n_up, keys.shape[2], generator=draw)
    try:
        scores = _score(press, keys, values, attention, 0)
    except Exception as error:
        raise ValueError(
            "PressPolicy: press must score keys, values and the newest queries' attention alone, "
            f"{name} does not ({type(error).__name__}: {error})"
        ) from error
    if scores.shape != keys.shape[:3] or not bool(scores.isfinite().all()):
        raise ValueError(
            f"PressPolicy: press must give a finite score for every head and token, {name} gave "
            f"{list(scores.shape)} for {list(keys.shape[:3])}"
        )


class NAMMPress:
    """A policy of ours as a press of kvpress, around a model that reads a prompt.

    While the prompt is read, nothing changes; behind each layer its keys go through the policy,
    ``n_up`` by ``n_up`` as a memory would have read them, and those it drops leave the cache. Heads
    must keep equally many, so the budget is one per head, without a threshold.

    Differs from a memory: the layers above have read with everything, as with every press.

    Args:
        policy: with a budget of the scope "per_head" that has a size and no threshold.

    Raises:
        ValueError: if the budget is another one, or the model has a batch of more than one row,
            softcapped or learned sinks.

    Example:
        In kvpress' environment::

            press = NAMMPress(NAMM.from_pretrained("bundled:stdlib-1m").with_budget(size=256))
            with press(model):
                model(input_ids, past_key_values=cache)
    """

    def __init__(self, policy: Policy) -> None:
        budget = policy.budget
        if budget.size is None or budget.scope != "per_head" or budget.threshold is not None:
            raise ValueError(
                "NAMMPress: policy must have a budget with a size, the scope 'per_head' and no "
                f"threshold, got {budget}"
            )
        self.policy = policy

    @contextmanager
    def __call__(self, model: Any) -> Iterator[NAMMPress]:
        """Compress every cache that the model fills inside the block."""
        decoder = getattr(model, "model", model)
        hooks = [
            layer.self_attn.register_forward_hook(self._hook, with_kwargs=True)
            for layer in decoder.layers
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs["cache"]
        layer = cache.layers[module.layer_idx]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if layer.keys.shape[2] > hidden.shape[1]:
            return output  # decoding
        kept = self.keep(module, hidden, layer.keys, layer.values, kwargs["position_embeddings"])
        layer.keys, layer.values = (
            t.gather(2, kept[..., None].expand(-1, -1, -1, t.shape[3])).contiguous()
            for t in (layer.keys, layer.values)
        )
        return output

    @torch.inference_mode()
    def keep(
        self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, rotation: Any
    ) -> Tensor:
        """``[1, H, N]`` positions that the policy keeps of a prompt in one layer, ascending.

        Args:
            module: the attention layer.
            hidden: ``[1, T, hidden size]``, its input.
            keys, values: ``[1, H, T, D]``.
            rotation: cosines and sines ``[1, T, D]`` of RoPE.
        """
        from kvpress.utils import get_prerope_query_states

        if keys.shape[0] != 1:
            raise ValueError(f"NAMMPress: a batch must have one row, got {keys.shape[0]}")
        if getattr(module, "sinks", None) is not None:
            raise ValueError("NAMMPress: the model must have no sinks")
        q = get_prerope_query_states(module, hidden)
        half = q.shape[-1] // 2
        cos, sin = (t[:, None].to(q.dtype) for t in rotation)
        q = q * cos + torch.cat([-q[..., half:], q[..., :half]], -1) * sin
        kv = RaggedKV(
            self.policy, batch_size=1, num_kv_heads=keys.shape[1], num_heads=q.shape[1],
            head_dim=keys.shape[3], head_dim_v=values.shape[3], softmax_scale=module.scaling,
            dtype=keys.dtype, layer_idx=module.layer_idx, device=keys.device,
            softcap=getattr(module, "attn_logit_softcapping", None) or 0.0,
        )  # fmt: skip
        pieces = Planner(self.policy.n_up)(kv.seen, keys.shape[2], None, keys.device)
        kv.forward(q, keys, values, pieces)
        store = kv.store.segments
        return torch.stack([store.pos[rows] for rows in store.slices()])[None].long()


__all__ = ["NAMMPress", "PressPolicy"]
