"""What a token is worth, and which ones stay."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..values import Segments
from .dispatch import call, kernels


def bam_scores(
    segments: Segments,
    params: Tensor,
    param_index: Tensor,
    mean: Tensor,
    var: Tensor,
    active: Tensor,
    *,
    log_transform: bool,
    log_eps: float,
) -> Tensor:
    """One score per live token by backward attention memory: each token looks at newer ones.

    Input of a token: sines and cosines of its age (newest position of the segment minus its own),
    then ``(state - mean) / max(sqrt(var), 1e-7)``; with ``log_transform``, of
    ``log(state + log_eps)`` and clamped to +-20.

    Args:
        segments: the store with 17 numbers of state per token; the keys do not matter.
        params: ``[P, 4172]`` float32 bank of parameter vectors.
        param_index: ``[B]`` int32, the vector of each batch row.
        mean: ``[17]`` float32.
        var: ``[17]`` float32.
        active: ``[B]`` bool.
        log_transform: whether to take logarithms.
        log_eps: added below the logarithm.

    Returns:
        ``[C]`` float32 (float64 for a float64 state); zero for rows that are not active.

    Raises:
        RuntimeError: if an argument differs from the above; on the CPU also if ``param_index``
            points outside the bank.

    Deterministic; a segment's result does not depend on the other rows of the batch.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k = torch.zeros(2, 1)
        >>> store = Segments(k, k, i32(0, 1), torch.ones(2, 17), i32(0, 2), i32(2))
        >>> bam_scores(store, torch.zeros(1, 4172), i32(0), torch.zeros(17), torch.ones(17),
        ...            torch.tensor([True]), log_transform=False, log_eps=0.0)
        tensor([0., 0.])
    """
    _, _, pos, state, cu_seqlens_k, seqused_k = segments
    if state.dtype is torch.float64:
        return reference.bam_scores(
            segments, params, param_index, mean, var, active,
            log_transform=log_transform, log_eps=log_eps,
        )  # fmt: skip
    return call(
        kernels.bam_scores.default, state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
        var, active, log_transform, log_eps,
    )  # fmt: skip


def mlp_scores(
    segments: Segments,
    params: Tensor,
    param_index: Tensor,
    mean: Tensor,
    var: Tensor,
    active: Tensor,
    *,
    log_transform: bool,
    log_eps: float,
    hidden: int,
    depth: int,
    bias: bool,
    residual_first: bool,
) -> Tensor:
    """One score per live token by a small ReLU network that sees that token alone.

    Input as in :func:`bam_scores`. Depth 1 is a linear map; from depth 3 on, the layers between
    the first and the last compute ``h + relu(h)``, as the original does.

    Args:
        segments: as in :func:`bam_scores`.
        params: ``[P, n]`` float32; per layer the weight ``[in][out]``, then the bias.
        param_index: ``[B]`` int32.
        mean: ``[17]`` float32.
        var: ``[17]`` float32.
        active: ``[B]`` bool.
        log_transform: whether to take logarithms.
        log_eps: added below the logarithm.
        hidden: width of the hidden layers.
        depth: number of layers, at least 1.
        bias: whether layers have one.
        residual_first: add the input to the first hidden layer; needs ``hidden == 25``.

    Returns:
        ``[C]`` float32 (float64 for a float64 state); zero for rows that are not active.

    Raises:
        RuntimeError: if an argument differs from the above; on the CPU also if ``param_index``
            points outside the bank.

    Deterministic; a token's result does not depend on the others but the newest.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k = torch.zeros(2, 1)
        >>> store = Segments(k, k, i32(0, 1), torch.ones(2, 17), i32(0, 2), i32(2))
        >>> mlp_scores(store, torch.zeros(1, 25), i32(0), torch.zeros(17), torch.ones(17),
        ...            torch.tensor([True]), log_transform=False, log_eps=0.0, hidden=25, depth=1,
        ...            bias=False, residual_first=False)
        tensor([0., 0.])
    """
    _, _, pos, state, cu_seqlens_k, seqused_k = segments
    if state.dtype is torch.float64:
        return reference.mlp_scores(
            segments, params, param_index, mean, var, active,
            log_transform=log_transform, log_eps=log_eps, hidden=hidden, depth=depth, bias=bias,
            residual_first=residual_first,
        )  # fmt: skip
    return call(
        kernels.mlp_scores.default, state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
        var, active, log_transform, log_eps, hidden, depth, bias, residual_first,
    )  # fmt: skip


def gate_(
    segments: Segments,
    active: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_new: int,
    rotary_dim: int,
    interleaved: bool = False,
    eps: float = 1e-6,
) -> None:
    """Linear gate of the newest tokens into the last column of the state, in place.

    One float per token and KV head from the keys and values of all KV heads of the layer at that
    token, ``g_h = weight[h] . x + bias[h]``. RoPE turns the first R = ``rotary_dim`` dimensions of
    a key in pairs, dimension i with i + R / 2, or 2 i with 2 i + 1 if ``interleaved``; with ``p_h``
    the lengths of the R / 2 pairs and ``m_h`` these, then the other D - R dimensions as they are::

        x = [m_h | log(p_h + eps) | v_h | log(|v_h| + eps) | log(|k_h| + eps)]

    each block for all H heads in order, ``H * (D + Dv + 2)`` numbers in float32. A token's gate
    depends on the token alone, so that writing it again changes nothing.

    Args:
        segments: the store with F >= 1 numbers of state per token, of which the last is written.
        active: ``[B]`` bool; the other batch rows stay as they are.
        weight: ``[H, H * (D + Dv + 2)]`` float32.
        bias: ``[H]`` float32.
        num_new: newest live rows of every segment to work on; they are the same tokens in all
            heads of a batch row.
        rotary_dim: R, even, in ``[0, D]``; 0 for a model without RoPE.
        interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).
        eps: added below the logarithms, not negative.

    Raises:
        RuntimeError: if an argument differs from the above; on the CPU also if an active batch row
            has a head with fewer live rows, or heads with other positions in them. Nothing has
            been written then.

    Deterministic; a token's result does not depend on the others.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k, v, state = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]), torch.zeros(1, 3)
        >>> store = Segments(k, v, i32(0), state, i32(0, 1), i32(1))
        >>> weight = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
        >>> gate_(store, torch.tensor([True]), weight, torch.zeros(1), num_new=1, rotary_dim=2)
        >>> state
        tensor([[0., 0., 7.]])
    """
    k, v, pos, state, cu_seqlens_k, seqused_k = segments
    if k.dtype is torch.float64 or state.dtype is torch.float64:
        reference.gate_(
            segments, active, weight, bias,
            num_new=num_new, rotary_dim=rotary_dim, interleaved=interleaved, eps=eps,
        )  # fmt: skip
        return
    call(
        kernels.gate_.default, state, k, v, pos, cu_seqlens_k, seqused_k, active, weight, bias,
        num_new, rotary_dim, interleaved, eps,
    )  # fmt: skip


def select(
    scores: Tensor,
    segments: Segments,
    active: Tensor,
    *,
    threshold: float,
    cache_size: int,
    budget: str,
    fill: bool,
    protect_newest: bool,
    sink_tokens: int,
    recent_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Decide which live rows stay.

    Candidates are rows with ``score >= threshold`` and forced rows. A budget keeps the first of
    them in the order: forced (a segment's newest before the others), score descending, position
    descending (the newer token wins a tie), head ascending. -0 equals +0.

    Args:
        scores: ``[C]`` float32.
        segments: the store; keys and state do not matter, positions are not negative.
        active: ``[B]`` bool; rows that are not keep everything.
        threshold: ``-inf`` for none.
        cache_size: -1 for none, else at least 1.
        budget: "per_head": at most ``cache_size`` rows per segment. "per_layer": at most
            ``cache_size * H`` per batch row, shared by its segments.
        fill: the released code's rule: every segment of a batch row keeps as many as the one that
            keeps most, filled up in the same order. Only with "per_head".
        protect_newest: force the newest row of each segment.
        sink_tokens: force rows with ``pos`` below it.
        recent_tokens: force rows whose age is below it.

    Returns:
        ``keep [C]`` uint8, 1 for live rows that stay, and ``num_kept [S]`` int32. **A segment with
        a NaN score has num_kept -1: check for it.**

    Raises:
        RuntimeError: if an argument differs from the above.

    Equal on every device.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k = torch.zeros(3, 0)
        >>> store = Segments(k, k, i32(0, 1, 2), k, i32(0, 3), i32(3))
        >>> keep, num_kept = select(
        ...     torch.tensor([1.0, -1.0, -2.0]), store, torch.tensor([True]), threshold=0.0,
        ...     cache_size=-1, budget="per_head", fill=False, protect_newest=True, sink_tokens=0,
        ...     recent_tokens=0)
        >>> keep.tolist(), num_kept.tolist()
        ([1, 0, 1], [2])
    """
    if scores.dtype is torch.float64:
        return reference.select(
            scores, segments, active,
            threshold=threshold, cache_size=cache_size, budget=budget, fill=fill,
            protect_newest=protect_newest, sink_tokens=sink_tokens, recent_tokens=recent_tokens,
        )  # fmt: skip
    _, _, pos, _, cu_seqlens_k, seqused_k = segments
    return call(
        kernels.select.default, scores, pos, cu_seqlens_k, seqused_k, active, threshold, cache_size,
        budget, fill, protect_newest, sink_tokens, recent_tokens,
    )  # fmt: skip
