"""The interface of every eviction policy.

A layer calls :meth:`Policy.update` every ``n_up`` tokens, then :meth:`Policy.select`, and
compacts its store to the rows that were kept. Policies hold no per-sequence data: that lives in
the store's ``state``, so one policy serves any number of caches.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..budget import Budget, whole_tokens
from ..transfer import from_host
from ..values import Segments, Window
from .calibration import Calibration
from .origin import shape_of


@dataclass(frozen=True)
class UpdateContext:
    """What one layer shows a policy at an update.

    Attributes:
        segments: the store: ``ctx.segments.k`` and so on.
        window: the queries of the period. ``window.active`` are the batch rows that are due. With
            ``needs_window = False``, ``window.q`` and ``window.lse`` have no rows.
        softmax_scale: of the attention.
        layer_idx: of the layer.
        num_kv_heads: H.
        param_index: ``[B]`` int32, candidate of each row in a bank of parameters.
        seen: real tokens of each row so far, B ints.
        due: the same as ``window.active``, B bools on the host.
        softcap: bound of the attention's logits, 0 for none.
    """

    segments: Segments
    window: Window
    softmax_scale: float
    layer_idx: int
    num_kv_heads: int
    param_index: Tensor
    seen: tuple[int, ...]
    due: tuple[bool, ...]
    softcap: float = 0.0


class Room(NamedTuple):
    """Tokens that a KV head may hold after an update; a mean where heads share."""

    size: int | None
    sinks: int
    recent: int


PolicyT = TypeVar("PolicyT", bound="Policy")


class Policy:
    """Base of NAMM and of every baseline: a score per token, and a budget that says who stays.

    Attributes:
        n_up: real tokens between two updates.
        num_state: float32 numbers a token carries (F); 0 for none.
        needs_window: whether :meth:`update` reads ``ctx.window``; without it the store keeps no
            queries.
        budget: how much stays; no limit by default.
        calibration: what makes layers and heads comparable, for one model; None for none.
        made_for: shape of the model that it was fitted to, evolved on or calibrated for; None if
            it was made for none.
        min_recent: newest tokens that stay whatever the budget says, as far as there is room.
        predicts_importance: whether scores are meant as log importance, so that a calibration adds
            offsets to them and does not scale them.
        two_passes: whether :meth:`for_context` reads a context before the memory does.
    """

    n_up: int
    num_state: int = 0
    needs_window: bool = True
    budget: Budget = Budget()
    calibration: Calibration | None = None
    made_for: Mapping[str, Any] | None = None
    min_recent: int = 0
    predicts_importance: bool = False
    two_passes: bool = False

    # Deciding ----------------------------------------------------------------------------------

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Score every live token: ``scores [C]`` and the new ``state [C, F]``, out of place."""
        raise NotImplementedError

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Apply the budget. What a row keeps never depends on other rows.

        Args:
            scores: ``[C]``, higher stays longer.
            ctx: the update they belong to.

        Returns:
            ``keep [C]`` uint8 and ``num_kept [S]`` int32, -1 where a score is NaN
            (:func:`check_num_kept`).

        Raises:
            ValueError: if the budget needs a calibration that is missing or of another model.
        """
        threshold = -math.inf if self.budget.threshold is None else float(self.budget.threshold)
        if self.calibration is not None and self.budget.scope != "per_head":
            scores = self._comparable(scores, ctx, self.calibration, threshold)
            if threshold > -math.inf:  # by now the scores below it are -inf
                threshold = torch.finfo(scores.dtype).min
        rooms = [
            self.room(ctx.layer_idx, n) if due else None
            for n, due in zip(ctx.seen, ctx.due, strict=True)
        ]
        first, *others = dict.fromkeys(r for r in rooms if r is not None) or [Room(None, 0, 0)]
        if not others:
            return self._choose(scores, ctx, ctx.window.active, threshold, first)
        choices = []
        for room in (first, *others):  # the op has one size: rows of other sizes wait
            mine = from_host([r == room for r in rooms], torch.bool, scores.device)
            choices.append(self._choose(scores, ctx, mine, threshold, room))
        # A row that waits keeps all it has, so the least is what the row's own call has decided.
        keep, num_kept = (torch.stack(parts).amin(0) for parts in zip(*choices, strict=True))
        return keep, num_kept

    def _choose(
        self, scores: Tensor, ctx: UpdateContext, active: Tensor, threshold: float, room: Room
    ) -> tuple[Tensor, Tensor]:
        return ops.select(
            scores,
            ctx.segments,
            active,
            threshold=threshold,
            cache_size=-1 if room.size is None else room.size,
            # Each layer has its part of the global budget, which its heads share.
            budget="per_head" if self.budget.scope == "per_head" else "per_layer",
            fill=self.budget.selection == "original",
            protect_newest=self.budget.protect_newest,
            sink_tokens=room.sinks,
            recent_tokens=room.recent,
        )

    def _comparable(
        self, scores: Tensor, ctx: UpdateContext, calibration: Calibration, threshold: float
    ) -> Tensor:
        """Scores that compare across heads, -inf below the threshold; NaN stays NaN."""
        calibration.check_model(None, ctx.num_kv_heads)
        slots = torch.arange(scores.numel(), device=scores.device, dtype=torch.int32)
        ends = ctx.segments.cu_seqlens_k[1:]
        head = torch.bucketize(slots, ends, right=True) % ctx.num_kv_heads
        comparable = calibration.comparable(scores, ctx.layer_idx, head)
        return comparable.masked_fill(scores < threshold, -math.inf)

    def room(self, layer_idx: int, seen: int) -> Room:
        """What the budget leaves to a head of a layer when its row has seen ``seen`` tokens.

        Raises:
            ValueError: if the scope is "global" and there is no calibration, or the budget says
                nothing about the layer.
        """
        size, limit = self.budget.size, None
        if isinstance(size, str):
            raise ValueError(f"Budget: size in bytes needs a NAMMCache, got {size!r} without one")
        if self.budget.scope == "global":
            if self.calibration is None:
                raise ValueError(
                    "Budget: scope 'global' needs a calibration for the model, got none; run "
                    "`namm calibrate MODEL` to make one"
                )
            assert size is not None  # a Budget makes sure
            share = size if isinstance(size, float) else min(1.0, size / max(seen, 1))
            limit = whole_tokens(seen * self.calibration.layer_fraction(layer_idx, share))
        elif size is not None:
            tokens = size * seen if isinstance(size, float) else size
            limit = whole_tokens(tokens * self.budget.layer_share(layer_idx))
        num_tokens = seen if limit is None else limit
        sinks, recent = self.budget.floors(num_tokens)
        return Room(limit, sinks, max(recent, min(self.min_recent, num_tokens - sinks)))

    @property
    def couples_heads(self) -> bool:
        """Whether the heads of a layer decide together, so that a process must hold them all."""
        return self.budget.couples_heads

    # Deriving one policy from another ----------------------------------------------------------

    def with_budget(self: PolicyT, budget: Budget | None = None, **changes: Any) -> PolicyT:
        """The same policy with another budget, or with fields of its budget changed.

        Example:
            >>> from namm_ext.baselines import KNorm
            >>> KNorm(256).with_budget(scope="per_layer", sink_tokens=4).budget
            Budget(256, scope='per_layer', sink_tokens=4)
        """
        other = copy.copy(self)
        other.budget = dataclasses.replace(self.budget if budget is None else budget, **changes)
        return other

    def with_calibration(self: PolicyT, calibration: Calibration | None) -> PolicyT:
        """The same policy, calibrated for a model."""
        other = copy.copy(self)
        other.calibration = calibration
        return other

    def with_made_for(self: PolicyT, config: Any) -> PolicyT:
        """The same policy, made for the model of a decoder's configuration, or for none (None)."""
        other = copy.copy(self)
        other.made_for = None if config is None else shape_of(config)
        return other

    def for_context(self, model: Any, tokenizer: Any, ids: Sequence[int]) -> Policy:
        """The policy that reads one context; itself, unless it has to know more than a cache shows.

        Args:
            model: the causal language model of transformers that will read.
            tokenizer: of the model.
            ids: the whole context.
        """
        del model, tokenizer, ids
        return self

    def to(self: PolicyT, device: torch.device | str) -> PolicyT:
        """This policy with its tensors on ``device``; itself if they are there already."""
        if self.calibration is None or self.calibration.to(device) is self.calibration:
            return self
        return self.with_calibration(self.calibration.to(device))

    # Identity ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, ready for JSON."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that decide besides the settings, by name."""
        if self.calibration is None:
            return {}
        return {f"calibration.{name}": t for name, t in self.calibration.tensors().items()}

    def fingerprint(self) -> str:
        """Hash of everything that decides what is kept; saved caches refer to it."""
        return hash_of(self, self.to_dict(), self.tensors().values())

    def earlier_fingerprints(self) -> tuple[str, ...]:
        """What :meth:`fingerprint` was in caches that version 1 of the files refers to."""
        return ()


def as_budget(value: Budget | int | float | str | None, **fields: Any) -> Budget:
    """A budget as it is; a bare size as a budget with ``fields``."""
    return value if isinstance(value, Budget) else Budget(value, **fields)


def check_num_kept(num_kept: Tensor | Sequence[int], ctx: UpdateContext) -> list[int]:
    """Rows kept in each segment as ints, after making sure that no score was NaN.

    Args:
        num_kept: ``[S]`` from :meth:`Policy.select`, or what the host has read of it.
        ctx: the update it belongs to, for the message.

    Returns:
        S ints. One device synchronisation for a tensor.

    Raises:
        ValueError: names the layer, batch row and KV head of the first NaN score.
    """
    read = num_kept.tolist() if isinstance(num_kept, Tensor) else num_kept
    counts = [int(n) for n in read]
    for s, n in enumerate(counts):
        if n < 0:
            row, head = divmod(s, ctx.num_kv_heads)
            raise ValueError(
                f"select: scores must not be NaN, got NaN in layer {ctx.layer_idx}, "
                f"batch row {row}, KV head {head}"
            )
    return counts


def hash_of(policy: Policy, settings: dict[str, Any], tensors: Iterable[Tensor]) -> str:
    """Hash of the class, its settings and its tensors."""
    digest = hashlib.sha256(type(policy).__name__.encode())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def checked(name: str, value: Tensor, shape: tuple[int, ...] | None, source: str) -> Tensor:
    """A float32 contiguous copy of ``value``; ValueError unless shaped as asked and finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{source}: {name} must be a floating tensor, got {kind}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{source}: {name} must be {list(shape)}, got {list(value.shape)}")
    copy = value.detach().to(torch.float32, copy=True).contiguous()
    num_bad = int((~copy.isfinite()).sum())
    if num_bad:
        raise ValueError(f"{source}: {name} must be finite, got {num_bad} NaN or infinite values")
    return copy
