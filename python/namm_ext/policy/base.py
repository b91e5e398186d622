"""The interface of every eviction policy.

A layer calls :meth:`Policy.update` every ``n_up`` tokens, then :meth:`Policy.select`, and
compacts its store to the rows that were kept. Policies hold no per-sequence data: that lives in
the store's ``state``, so one policy serves any number of caches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class UpdateContext:
    """What one layer shows a policy at an update. Shapes as in ``params.h``.

    Attributes:
        q_window: ``[B, Hq, 16 + n_up, D]`` queries after RoPE, the first 16 of the last period.
        lse_window: ``[B, Hq, 16 + n_up]`` log-sum-exp of each of those rows.
        k, v, pos, state: the store, ``[C, D]``, ``[C, Dv]``, ``[C]`` int32, ``[C, F]``.
        cu_seqlens_k, seqused_k: slots ``[S + 1]`` and live rows ``[S]``, int32.
        pos_q: ``[B]`` int32 position of window row 0.
        active: ``[B]`` bool, rows of the batch that are due; the others stay as they are.
        softmax_scale: of the attention.
        layer_idx: of the layer.
        num_kv_heads: H.
        param_index: ``[B]`` int32, candidate of each row in a bank of parameters.
        seen: ``[B]`` int32 real tokens of each row so far.
    """

    q_window: Tensor
    lse_window: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    state: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    pos_q: Tensor
    active: Tensor
    softmax_scale: float
    layer_idx: int
    num_kv_heads: int
    param_index: Tensor
    seen: Tensor


class Policy:
    """Base of NAMM and of every baseline.

    Attributes:
        n_up: real tokens between two updates.
        num_state: float32 numbers a token carries (F); 0 for none.
        needs_window: whether :meth:`update` reads ``q_window`` and ``lse_window``; without it the
            store keeps no queries and both have no rows.
    """

    n_up: int
    num_state: int = 0
    needs_window: bool = True

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Score every live token: ``scores [C]`` and the new ``state [C, F]``, out of place."""
        raise NotImplementedError

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Turn scores into ``keep [C]`` uint8 and ``num_kept [S]`` int32 (-1: NaN score)."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Policy:
        """This policy with its tensors on ``device``."""
        del device
        return self

    def fingerprint(self) -> str:
        """Hash of everything that decides what is kept; saved caches refer to it."""
        raise NotImplementedError


def select_rows(
    scores: Tensor,
    ctx: UpdateContext,
    *,
    threshold: float | None = None,
    cache_size: int | None = None,
    budget: str = "per_head",
    fill: bool = False,
    protect_newest: bool = True,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`namm_ext.ops.select` on the segments of an update; None means no limit.

    Returns:
        ``keep [C]`` uint8 and ``num_kept [S]`` int32.
    """
    return ops.select(
        scores,
        ctx.pos,
        ctx.cu_seqlens_k,
        ctx.seqused_k,
        ctx.active,
        threshold=-math.inf if threshold is None else float(threshold),
        cache_size=-1 if cache_size is None else cache_size,
        budget=budget,
        fill=fill,
        protect_newest=protect_newest,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )


def layer_share(layer_shares: tuple[float, ...] | None, ctx: UpdateContext) -> float:
    """The share of the mean budget that the layer of an update has; 1 without ``layer_shares``.

    Raises:
        ValueError: if there is no entry for the layer.
    """
    if layer_shares is None:
        return 1.0
    if not 0 <= ctx.layer_idx < len(layer_shares):
        raise ValueError(
            f"layer_shares must have an entry for every layer, got {len(layer_shares)} entries "
            f"and layer {ctx.layer_idx}"
        )
    return layer_shares[ctx.layer_idx]


def check_num_kept(num_kept: Tensor, ctx: UpdateContext) -> list[int]:
    """Rows kept in each segment as ints, after making sure that no score was NaN.

    Args:
        num_kept: ``[S]`` from :meth:`Policy.select`.
        ctx: the update it belongs to, for the message.

    Returns:
        S ints. One device synchronisation.

    Raises:
        ValueError: names the layer, batch row and KV head of the first NaN score.
    """
    counts = [int(n) for n in num_kept.tolist()]
    for s, n in enumerate(counts):
        if n < 0:
            row, head = divmod(s, ctx.num_kv_heads)
            raise ValueError(
                f"select: scores must not be NaN, got NaN in layer {ctx.layer_idx}, "
                f"batch row {row}, KV head {head}"
            )
    return counts


def fingerprint_of(policy: Policy, settings: Mapping[str, Any], tensors: Sequence[Tensor]) -> str:
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
