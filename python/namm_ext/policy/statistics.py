"""Statistics of running policies: what a NAMM normalises with, and thresholds for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..config import NAMMConfig
from ..reference import Statistics
from .base import Policy, UpdateContext


def calibrate_threshold(
    scores: Sequence[Tensor],
    keep_fraction: float | None = None,
    target_tokens: float | None = None,
) -> float:
    """Threshold that keeps a wanted share of the given scores.

    The k-th largest of all scores together, so at least k of them reach it (ties all do).

    Args:
        scores: scores of live tokens, one tensor per layer and update or per segment.
        keep_fraction: share of all tokens to keep, in (0, 1]; give this or target_tokens.
        target_tokens: tokens to keep per tensor of ``scores``, on average.

    Returns:
        The threshold; use it with ``policy.with_budget(threshold=...)``.

    Raises:
        ValueError: if there is no score, a NaN, or not exactly one goal in its range.

    Example:
        >>> calibrate_threshold([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], 0.5)
        3.0
    """
    pooled = torch.cat([s.detach().flatten().float().cpu() for s in scores] or [torch.empty(0)])
    total = pooled.numel()
    if total == 0:
        raise ValueError("calibrate_threshold: scores must hold at least one score, got none")
    if bool(pooled.isnan().any()):
        raise ValueError("calibrate_threshold: scores must not be NaN, got NaN")
    if (keep_fraction is None) == (target_tokens is None):
        raise ValueError(
            "calibrate_threshold: exactly one of keep_fraction and target_tokens must be given, "
            f"got {keep_fraction} and {target_tokens}"
        )
    if keep_fraction is not None:
        if not 0.0 < keep_fraction <= 1.0:
            raise ValueError(
                f"calibrate_threshold: keep_fraction must be in (0, 1], got {keep_fraction}"
            )
        wanted = keep_fraction * total
    else:
        assert target_tokens is not None
        if not target_tokens > 0:
            raise ValueError(
                f"calibrate_threshold: target_tokens must be positive, got {target_tokens}"
            )
        wanted = target_tokens * len(scores)
    k = min(max(round(wanted), 1), total)
    return float(pooled.sort(descending=True).values[k - 1])


class StatisticsCollector:
    """Running mean and variance of spectral features over any number of updates (spec 4).

    Batches are merged in float64 on the CPU. The order of batches matters only to rounding.

    Example:
        >>> collector = StatisticsCollector()
        >>> collector.add(torch.zeros(3, 17))
        >>> collector.add(torch.ones(1, 17))
        >>> float(collector.mean[0]), float(collector.var[0]), collector.count
        (0.25, 0.1875, 4)
    """

    def __init__(self) -> None:
        zeros = torch.zeros(reference.NUM_BINS, dtype=torch.float64)
        self._stats = Statistics(zeros, zeros.clone(), torch.tensor(0))

    def add(self, features: Tensor) -> None:
        """Merge the statistics of ``features [..., 17]``, all rows valid."""
        self._stats = reference.merge_statistics(
            self._stats, reference.batch_statistics(features.detach().cpu().double())
        )

    @property
    def count(self) -> int:
        """Tokens merged so far; a token counts again at every update and in every head."""
        return int(self._stats.num)

    @property
    def mean(self) -> Tensor:
        """``[17]`` float32. Raises ValueError if nothing was collected."""
        return self._collected().mean.float()

    @property
    def var(self) -> Tensor:
        """``[17]`` float32, biased. Raises ValueError if nothing was collected."""
        return self._collected().var.float()

    def _collected(self) -> Statistics:
        if self.count == 0:
            raise ValueError(
                "statistics: at least one update must have run, got none "
                "(are the sequences shorter than n_up?)"
            )
        return self._stats


class StatisticsCalibrator(Policy):
    """Policy that evicts nothing and collects the statistics a NAMM normalises with.

    Run a model with it over representative text, then pass ``mean`` and ``var`` to the NAMM
    (:meth:`NAMM.with_statistics`). Only this policy holds data of its run: use it once.

    Args:
        config: n_up, ema_coeff and the feature transform are used.
    """

    num_state = reference.NUM_BINS

    def __init__(self, config: NAMMConfig) -> None:
        self.config = config
        self.n_up = config.n_up
        self.collector = StatisticsCollector()

    @property
    def mean(self) -> Tensor:
        """``[17]`` float32."""
        return self.collector.mean

    @property
    def var(self) -> Tensor:
        """``[17]`` float32, biased."""
        return self.collector.var

    @property
    def count(self) -> int:
        """Tokens collected, over layers, heads and updates."""
        return self.collector.count

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Fold the period into the state and collect it; all scores are zero."""
        state = spectrogram(ctx, self.config)
        rows, segment = ctx.segments.live_rows()
        features = state[rows[ctx.window.active[segment // ctx.num_kv_heads]]]
        if features.numel():
            if self.config.feature_transform == "log":
                features = reference.log_features(features, self.config.log_eps)
            self.collector.add(features)
        return state.new_zeros(state.shape[0]), state

    def to_dict(self) -> dict[str, Any]:
        """The configuration."""
        return self.config.to_dict()


def spectrogram(ctx: UpdateContext, config: NAMMConfig) -> Tensor:
    """The state ``[C, 17]`` with the period of an update folded in."""
    return ops.spectrogram(
        ctx.window,
        ctx.segments,
        softmax_scale=ctx.softmax_scale,
        ema_coeff=config.ema_coeff,
        softcap=ctx.softcap,
    )
