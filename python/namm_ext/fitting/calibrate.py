"""Make the scores of a model's layers and heads comparable, from a few texts (spec 12.1, 12.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..budget import Budget
from ..cache import NAMMCache, borrow, cache_keyword
from ..cache.families import decoder_config
from ..policy import NAMM, Calibration, Policy, StatisticsCalibrator, UpdateContext
from ..policy.calibration import regress, rising
from .importance import Text, read_twice

PolicyT = TypeVar("PolicyT", bound=Policy)

#: Shares of the cache for which the division among the layers is stored.
FRACTIONS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)


class _Scores(Policy):
    """Another policy that evicts nothing and remembers its last scores of every layer."""

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.n_up, self.num_state = inner.n_up, inner.num_state
        self.needs_window = inner.needs_window
        self.scores: dict[int, Tensor] = {}

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """The inner policy's scores and state."""
        scores, state = self.inner.update(ctx)
        self.scores[ctx.layer_idx] = torch.stack([scores[r] for r in ctx.segments.slices()])
        return scores, state

    def to_dict(self) -> dict[str, Any]:
        """The inner policy's settings."""
        return self.inner.to_dict()


@torch.inference_mode()
def scores_of(policy: Policy, model: Any, ids: Sequence[int]) -> dict[int, Tensor]:
    """``[H, T']`` scores of each layer with a memory, after reading a text with nothing evicted.

    T' is the largest multiple of ``n_up`` up to ``len(ids)``.

    Raises:
        ValueError: if the text is shorter than ``n_up`` tokens.
    """
    num_tokens = len(ids) - len(ids) % policy.n_up
    if not num_tokens:
        raise ValueError(
            f"calibrate: texts must have at least n_up = {policy.n_up} tokens, got {len(ids)}"
        )
    reader = _Scores(policy)
    with borrow(model):
        given = {cache_keyword(model.base_model): NAMMCache(model, reader)}
        tokens = torch.tensor([ids[:num_tokens]], device=model.device)
        model.base_model(tokens, **given, use_cache=True)
    return {i: reader.scores[i].float().cpu() for i in sorted(reader.scores)}


def targets_of(model: Any, texts: Sequence[Text]) -> list[Tensor]:
    """``[M, H, T]`` log importance in the M layers with a memory, for each text."""
    return [
        torch.stack([layer.target for layer in read_twice(model, text)]).float().cpu()
        for text in texts
    ]


@torch.inference_mode()
def calibrate_statistics(
    policy: NAMM,
    model: Any,
    texts: Sequence[Text],
    *,
    on_text: Callable[[int], None] = lambda _: None,
) -> NAMM:
    """The same memory, normalising its features by what they are on a model (spec 4).

    Args:
        policy: with a scorer.
        model: a causal language model of transformers.
        texts: at least ``n_up`` tokens long.
        on_text: called with the number of texts read so far.
    """
    collector = StatisticsCalibrator(policy.config)
    with borrow(model):
        for number, text in enumerate(texts, start=1):
            given = {cache_keyword(model.base_model): NAMMCache(model, collector)}
            ids = torch.tensor([text.ids], device=model.device)
            model.base_model(ids, **given, use_cache=True)
            on_text(number)
    ready = policy.with_statistics(collector)
    return ready.with_made_for(decoder_config(model.config))


def calibrate(
    policy: PolicyT,
    model: Any,
    texts: Sequence[Text],
    *,
    targets: Sequence[Tensor] | None = None,
    on_text: Callable[[int], None] = lambda _: None,
) -> PolicyT:
    """The same policy, ready for the scope "global" on a model: a minute, no training.

    Each text is read three times: twice for the importance of its tokens, once for the policy's
    scores of them.

    Args:
        policy: whose scores are to be compared over layers and heads; the floors of its budget
            count as kept.
        model: a causal language model of transformers.
        texts: one or a few, at least ``n_up`` tokens long, of the lengths and kinds that matter.
        targets: what :func:`targets_of` says of them, to calibrate several policies at less cost.
        on_text: called with the number of texts read so far.

    Raises:
        ValueError: if there is no text or one is too short.
    """
    if not texts:
        raise ValueError("calibrate: texts must hold at least one text, got none")
    scores, known = [], []
    for number, text in enumerate(texts, start=1):
        by_layer = scores_of(policy, model, text.ids)
        scores.append(torch.stack(list(by_layer.values())))
        target = targets_of(model, [text])[0] if targets is None else targets[number - 1]
        known.append(target[..., : scores[-1].shape[2]])
        on_text(number)
    scaled = not policy.predicts_importance
    found = calibration_of(scores, known, policy.budget, scaled=scaled)
    config = decoder_config(model.config)
    ready = _for_all_layers(found, list(by_layer), config.num_hidden_layers)
    return policy.with_calibration(ready).with_made_for(config)


def _for_all_layers(found: Calibration, index: list[int], num_layers: int) -> Calibration:
    """Layers without a memory (sliding windows) have rows too; nobody asks for them."""
    offsets = found.offsets.new_zeros(num_layers, found.num_kv_heads)
    shares = found.fractions.expand(num_layers, -1).clone()
    scales = torch.ones_like(offsets)
    offsets[index], shares[index] = found.offsets, found.layer_fractions
    if found.scales is not None:
        scales[index] = found.scales
    return Calibration(offsets, found.fractions, shares, scales)


def calibration_of(
    scores: Sequence[Tensor],
    targets: Sequence[Tensor],
    budget: Budget | None = None,
    *,
    scaled: bool = False,
) -> Calibration:
    """Offsets of the heads, and how a global cut divides every budget among the layers.

    Args:
        scores: ``[L, H, T]`` of each text, larger for tokens that stay longer.
        targets: ``[L, H, T]`` log importance of the same tokens.
        budget: whose floors count as kept.
        scaled: whether scores are on a scale of their own, so that they are fitted to the log
            importance head by head (``regress``); otherwise heads get offsets alone.

    Example:
        >>> target = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0, 7.0]]])
        >>> found = calibration_of([target - target.mean(2, keepdim=True)], [target])
        >>> found.offsets.flatten().tolist(), round(found.layer_fraction(1, 0.5), 6)
        ([1.5, 5.5], 1.0)
    """
    floors = (budget or Budget()).floors
    if scaled:
        free = []
        for score in scores:
            sinks, recent = floors(score.shape[2] // 4)
            free.append(slice(sinks, score.shape[2] - recent))
        scales, offsets = regress(
            [s[..., part] for s, part in zip(scores, free, strict=True)],
            [t[..., part] for t, part in zip(targets, free, strict=True)],
        )
    else:
        offsets = torch.cat([t - s for s, t in zip(scores, targets, strict=True)], dim=2).mean(2)
        scales = torch.ones_like(offsets)
    comparable = [scales[..., None] * score + offsets[..., None] for score in scores]
    total = sum(score.numel() for score in scores)
    fractions, columns = [], []
    for count in sorted({max(1, round(fraction * total)) for fraction in FRACTIONS}):
        fraction = count / total
        ranked = []
        for score in comparable:
            num_tokens = score.shape[2]
            sinks, recent = floors(max(1, round(fraction * num_tokens)))
            forced = score.clone()
            forced[..., :sinks] = torch.inf
            forced[..., num_tokens - max(recent, 1) :] = torch.inf
            ranked.append(forced)
        pooled = torch.cat(ranked, dim=2).flatten(1)  # [L, H * tokens]
        cut = pooled.flatten().kthvalue(total - count + 1).values
        above, ties = pooled > cut, pooled == cut  # ties at the cut share what is left
        left = (count - int(above.sum())) / int(ties.sum())
        kept = above.double().sum(1) + left * ties.double().sum(1)
        fractions.append(fraction)
        columns.append((kept / pooled.shape[1]).clamp(max=1.0))
    # With floors that grow, a layer's part could fall between two budgets by a token.
    shares = torch.stack(columns, 1)
    return Calibration(
        offsets, torch.tensor(fractions, dtype=torch.float64), rising(shares), scales
    )
