"""Fused operators on a ragged KV cache: typed functions over ``torch.ops.namm_ext``.

They take the store of one layer as :class:`~namm_ext.values.Segments` and its newest queries as
:class:`~namm_ext.values.Window`, which say every shape and dtype. Sizes: B batch rows, H KV heads,
S = B * H segments, G query heads per KV head (query head ``h * G + g`` belongs to KV head h), D
``head_dim``, Dv ``head_dim_v``, L new columns, C rows of the store. Keys, values and queries are
float32, bfloat16 or float16 (one dtype per call), contiguous in their last dimension; the tensors
of the store are contiguous. Index tensors are int32, ``active`` is bool, everything else float32.
All arguments are on one device.

**float64** inputs go to :mod:`namm_ext.reference`, which has the same functions in plain torch, so
that a whole model can be checked in double precision.

The numbers inside index tensors are checked on the CPU, before anything is written. On CUDA that
would wait for the device, so there they are the caller's promise.

None of the ops is differentiable: with gradients enabled, an argument that requires them is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._library import libraries
from .values import Segments, Window

_ops = torch.ops.namm_ext
_float64 = torch.float64


def _check_gradients(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    if torch._C._any_requires_grad(*args):
        names = [argument.name for argument in op._schema.arguments]
        guilty = next(
            name
            for name, value in zip(names, args, strict=False)
            if isinstance(value, Tensor) and value.requires_grad
        )
        raise RuntimeError(
            f"{op._schema.name.partition('::')[2]}: {guilty} must not require grad, got "
            "requires_grad=True; the op is not differentiable, call it under torch.no_grad()"
        )


def _call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Dispatch below autograd, whose kernel is in Python and takes longer than a small op."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*args)  # inference mode passes below autograd by itself
    if torch.is_grad_enabled():
        _check_gradients(op, args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def append_(
    segments: Segments,
    k_new: Tensor,
    v_new: Tensor,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
) -> None:
    """Put new tokens behind the live rows of their segments, in place.

    Row b brings columns ``[first[b], first[b] + num_new[b])``; the i-th of them gets position
    ``pos_first[b] + i`` and a zero state. ``seqused_k`` grows by ``num_new[b]``.

    Args:
        segments: the store, written, all but ``cu_seqlens_k``.
        k_new: ``[B, H, L, D]`` keys after RoPE, any strides over the first three dimensions.
        v_new: ``[B, H, L, Dv]``.
        first: ``[B]`` int32, first column that is a real token.
        num_new: ``[B]`` int32, number of real tokens.
        pos_first: ``[B]`` int32, position of the first of them, above those in the segment.

    Raises:
        RuntimeError: if an argument differs from the above, or (CPU) a segment has no room for
            its new rows. Nothing has been written then.

    Bit-exact on every device.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k, v, pos, state = torch.zeros(3, 1), torch.zeros(3, 1), i32(0, 0, 0), torch.zeros(3, 0)
        >>> store = Segments(k, v, pos, state, i32(0, 3), i32(1))
        >>> new = torch.tensor([5.0, 6.0]).view(1, 1, 2, 1)
        >>> append_(store, new, new, i32(0), i32(2), i32(7))
        >>> k.flatten().tolist(), pos.tolist(), store.seqused_k.tolist()
        ([0.0, 5.0, 6.0], [0, 7, 8], [3])
    """
    k, v, pos, state, cu_seqlens_k, seqused_k = segments
    if k.dtype is _float64 or state.dtype is _float64:
        reference.append_(segments, k_new, v_new, first, num_new, pos_first)
        return
    _call(
        _ops.append_.default, k, v, pos, state, seqused_k, cu_seqlens_k, k_new, v_new, first,
        num_new, pos_first,
    )  # fmt: skip


def attend_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    segments: Segments,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
    *,
    softmax_scale: float,
) -> None:
    """Softmax attention of new queries over the ragged segments, causal by position, in place.

    Query column c of row b stands at ``pos_first[b] + c - first[b]`` and sees the live rows with
    ``pos`` up to that; their positions increase. A query that sees nothing gets ``out = 0`` and
    ``lse = -inf``. Columns outside ``[first, first + num_new)`` are left as they are.

    Args:
        out: ``[B, L, H * G, Dv]``, written; contiguous in its last dimension.
        lse: ``[B, H * G, L]`` float32, written: natural logarithm of the sum of exponentials of
            the scaled products.
        q: ``[B, H * G, L, D]`` queries after RoPE, any strides over the first three dimensions.
        segments: the store, new keys included; the state does not matter.
        first: ``[B]`` int32, first real column.
        num_new: ``[B]`` int32, number of real columns.
        pos_first: ``[B]`` int32, position of the first of them.
        softmax_scale: factor on the products, usually ``D ** -0.5``.

    Raises:
        RuntimeError: if an argument differs from the above.

    Deterministic; a row's result does not depend on the other rows of the batch.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k, v = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
        >>> store = Segments(k, v, i32(0, 1), torch.zeros(2, 0), i32(0, 2), i32(2))
        >>> out, lse, one = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> attend_(out, lse, one, store, i32(0), i32(1), i32(1), softmax_scale=1.0)
        >>> out.item(), round(lse.item(), 4)
        (2.0, 0.6931)
    """
    if q.dtype is _float64:
        reference.attend_(
            out, lse, q, segments, first, num_new, pos_first, softmax_scale=softmax_scale
        )
        return
    k, v, pos, _, cu_seqlens_k, seqused_k = segments
    _call(
        _ops.attend_.default, out, lse, q, k, v, pos, cu_seqlens_k, seqused_k, first, num_new,
        pos_first, softmax_scale,
    )  # fmt: skip


def attend(
    q: Tensor,
    segments: Segments,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`attend_` into new tensors.

    Columns outside ``[first, first + num_new)`` have ``out = 0`` and ``lse = -inf``.

    Args:
        q: ``[B, H * G, L, D]``.
        segments: the store, new keys included; the state does not matter.
        first: ``[B]`` int32.
        num_new: ``[B]`` int32.
        pos_first: ``[B]`` int32.
        softmax_scale: factor on the products.

    Returns:
        ``out [B, L, H * G, Dv]`` in the dtype of ``q`` and ``lse [B, H * G, L]`` float32 (float64
        for float64 queries).

    Raises:
        RuntimeError: as :func:`attend_`.

    Deterministic; a row's result does not depend on the other rows of the batch.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k, v = torch.zeros(2, 1), torch.ones(2, 1)
        >>> store = Segments(k, v, i32(0, 1), torch.zeros(2, 0), i32(0, 2), i32(2))
        >>> out, lse = attend(torch.ones(1, 1, 1, 1), store, i32(0), i32(1), i32(1),
        ...                   softmax_scale=1.0)
        >>> out.item(), tuple(lse.shape)
        (1.0, (1, 1, 1))
    """
    batch_size, num_heads, num_cols, _ = q.shape
    out = q.new_zeros(batch_size, num_cols, num_heads, segments.v.shape[-1])
    dtype = _float64 if q.dtype is _float64 else torch.float32
    lse = q.new_full((batch_size, num_heads, num_cols), -torch.inf, dtype=dtype)
    attend_(out, lse, q, segments, first, num_new, pos_first, softmax_scale=softmax_scale)
    return out, lse


def spectrogram(
    window: Window,
    segments: Segments,
    *,
    softmax_scale: float,
    ema_coeff: float,
) -> Tensor:
    """Spectrum of the attention each key received in a period, folded into its running average.

    ``P = exp(q k^T * softmax_scale - lse)`` is recomputed, averaged over the G heads of a group,
    windowed (Hann, 32 rows every 16), Fourier-transformed; the 17 magnitudes of the frames enter
    ``E <- a E + (1 - a) Y`` with ``a = ema_coeff ** 16``. Window row i stands at ``pos_q[b] + i``;
    P is 0 where ``pos`` is larger than that.

    Args:
        window: of 16 + n_up rows, n_up a positive multiple of 16; ``lse`` is contiguous in its last
            dimension. Batch rows that are not active keep their state.
        segments: the store, its state ``[C, 17]`` E before the period, zero for keys born in it.
        softmax_scale: the factor attention used.
        ema_coeff: per token, in [0, 1].

    Returns:
        ``[C, 17]`` float32, E after the period.

    Raises:
        RuntimeError: if an argument differs from the above.

    Deterministic; a segment's result does not depend on the other rows of the batch.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> q, lse, k = torch.zeros(1, 1, 32, 4), torch.zeros(1, 1, 32), torch.zeros(1, 4)
        >>> store = Segments(k, k, i32(0), torch.zeros(1, 17), i32(0, 1), i32(1))
        >>> window = Window(q, lse, i32(0), torch.tensor([True]))
        >>> new = spectrogram(window, store, softmax_scale=0.5, ema_coeff=0.5 ** (1 / 16))
        >>> [round(x, 4) for x in new[0, :3].tolist()]
        [8.0, 4.0, 0.0]
    """
    q, lse, pos_q, active = window
    k, _, pos, state, cu_seqlens_k, seqused_k = segments
    if q.dtype is _float64 or state.dtype is _float64:
        return reference.spectrogram(
            window, segments, softmax_scale=softmax_scale, ema_coeff=ema_coeff
        )
    return _call(
        _ops.spectrogram.default, q, lse, k, pos, state, cu_seqlens_k, seqused_k, pos_q, active,
        softmax_scale, ema_coeff,
    )  # fmt: skip


def attention_received(
    window: Window,
    segments: Segments,
    *,
    softmax_scale: float,
    first_row: int,
) -> Tensor:
    """Attention each key received from the window's queries, summed.

    The group mean of P, as in :func:`spectrogram`, summed over window rows from ``first_row`` on.

    Args:
        window: as in :func:`spectrogram`.
        segments: the store; the state does not matter.
        softmax_scale: the factor attention used.
        first_row: in ``[0, 16 + n_up]``; 16 leaves the previous period's queries out.

    Returns:
        ``[C]`` float32 (float64 for float64 queries); zero for rows that are not active.

    Raises:
        RuntimeError: if an argument differs from the above.

    Deterministic; a segment's result does not depend on the other rows of the batch.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> q, lse, k = torch.zeros(1, 1, 32, 4), torch.zeros(1, 1, 32), torch.zeros(1, 4)
        >>> store = Segments(k, k, i32(0), torch.zeros(1, 0), i32(0, 1), i32(1))
        >>> window = Window(q, lse, i32(0), torch.tensor([True]))
        >>> attention_received(window, store, softmax_scale=0.5, first_row=16)
        tensor([16.])
    """
    q, lse, pos_q, active = window
    if q.dtype is _float64:
        return reference.attention_received(
            window, segments, softmax_scale=softmax_scale, first_row=first_row
        )
    k, _, pos, _, cu_seqlens_k, seqused_k = segments
    return _call(
        _ops.attention_received.default, q, lse, k, pos, cu_seqlens_k, seqused_k, pos_q, active,
        softmax_scale, first_row,
    )  # fmt: skip


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
    if state.dtype is _float64:
        return reference.bam_scores(
            segments, params, param_index, mean, var, active,
            log_transform=log_transform, log_eps=log_eps,
        )  # fmt: skip
    return _call(
        _ops.bam_scores.default, state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
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
    if state.dtype is _float64:
        return reference.mlp_scores(
            segments, params, param_index, mean, var, active,
            log_transform=log_transform, log_eps=log_eps, hidden=hidden, depth=depth, bias=bias,
            residual_first=residual_first,
        )  # fmt: skip
    return _call(
        _ops.mlp_scores.default, state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
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
    if k.dtype is _float64 or state.dtype is _float64:
        reference.gate_(
            segments, active, weight, bias,
            num_new=num_new, rotary_dim=rotary_dim, interleaved=interleaved, eps=eps,
        )  # fmt: skip
        return
    _call(
        _ops.gate_.default, state, k, v, pos, cu_seqlens_k, seqused_k, active, weight, bias,
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
    if scores.dtype is _float64:
        return reference.select(
            scores, segments, active,
            threshold=threshold, cache_size=cache_size, budget=budget, fill=fill,
            protect_newest=protect_newest, sink_tokens=sink_tokens, recent_tokens=recent_tokens,
        )  # fmt: skip
    _, _, pos, _, cu_seqlens_k, seqused_k = segments
    return _call(
        _ops.select.default, scores, pos, cu_seqlens_k, seqused_k, active, threshold, cache_size,
        budget, fill, protect_newest, sink_tokens, recent_tokens,
    )  # fmt: skip


def compact(
    segments: Segments,
    keep: Tensor,
    num_kept: Tensor,
    cu_seqlens_new: Tensor,
    *,
    capacity: int,
) -> Segments:
    """Copy the kept rows of every segment, in order, into a new store with its own slots.

    The result owns its memory, so dropping the old store really frees the evicted rows.

    Args:
        segments: the old store.
        keep: ``[C]`` uint8, 1 for live rows that stay.
        num_kept: ``[S]`` int32, the number of ones among the live rows.
        cu_seqlens_new: ``[S + 1]`` int32 of the new store; slot s holds at least ``num_kept[s]``.
        capacity: rows of the new store, ``cu_seqlens_new[S]``.

    Returns:
        The new store. Its ``cu_seqlens_k`` and ``seqused_k`` are ``cu_seqlens_new`` and
        ``num_kept`` themselves.

    Raises:
        RuntimeError: if an argument differs from the above; on the CPU also if ``num_kept``
            disagrees with ``keep`` or a slot is too short.

    Bit-exact on every device.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k = torch.tensor([[1.0], [2.0], [3.0]])
        >>> store = Segments(k, k, i32(0, 1, 2), torch.zeros(3, 0), i32(0, 3), i32(3))
        >>> keep = torch.tensor([1, 0, 1], dtype=torch.uint8)
        >>> new = compact(store, keep, i32(2), i32(0, 2), capacity=2)
        >>> new.k.flatten().tolist(), new.pos.tolist()
        ([1.0, 3.0], [0, 2])
    """
    k, v, pos, state, cu_seqlens_k, seqused_k = segments
    if k.dtype is _float64 or state.dtype is _float64:
        return reference.compact(segments, keep, num_kept, cu_seqlens_new, capacity=capacity)
    tokens = _call(
        _ops.compact.default, k, v, pos, state, cu_seqlens_k, seqused_k, keep, num_kept,
        cu_seqlens_new, capacity,
    )  # fmt: skip
    return Segments._make((*tokens, cu_seqlens_new, num_kept))


# What torch.compile needs to know: shapes and dtypes of the results --------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Register what an op returns for tensors without data.

    It is asked for real tensors too as soon as one of them is on the "meta" device: it would do
    nothing then, and say nothing.
    """

    def register(function: Callable[..., Any]) -> None:
        def checked(*args: Any) -> Any:
            devices = {str(a.device): i for i, a in enumerate(args) if isinstance(a, Tensor)}
            if len(devices) > 1:
                names = [a.name for a in getattr(_ops, name).default._schema.arguments]
                where = ", ".join(f"{names[i]} on {device}" for device, i in devices.items())
                raise RuntimeError(f"{name}: all tensors must be on one device, got {where}")
            return function(*args)

        torch.library.register_fake(f"namm_ext::{name}")(checked)

    return register


@_fake("append_")
def _(*args: Any) -> None:
    return None


@_fake("attend_")
def _(*args: Any) -> None:
    return None


@_fake("spectrogram")
def _(
    q_window: Tensor, lse_window: Tensor, k: Tensor, pos: Tensor, state: Tensor, *_: Any
) -> Tensor:
    return state.new_empty(state.shape)


@_fake("attention_received")
def _(q_window: Tensor, lse_window: Tensor, k: Tensor, *_: Any) -> Tensor:
    return lse_window.new_empty(k.shape[0])


@_fake("bam_scores")
def _(state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape[0])


@_fake("mlp_scores")
def _(state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape[0])


@_fake("gate_")
def _(*args: Any) -> None:
    return None


@_fake("select")
def _(
    scores: Tensor, pos: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.uint8), seqused_k.new_empty(seqused_k.shape)


@_fake("compact")
def _(
    k: Tensor, v: Tensor, pos: Tensor, state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    capacity = rest[-1]
    return (
        k.new_empty(capacity, k.shape[1]),
        v.new_empty(capacity, v.shape[1]),
        pos.new_empty(capacity),
        state.new_empty(capacity, state.shape[1]),
    )


# Gradients: an op without a formula would silently return results that carry none -------------

_library = torch.library.Library("namm_ext", "IMPL")


def _refuse_gradients(name: str) -> None:
    """For calls of ``torch.ops`` and under torch.compile; ``_call`` passes below it."""
    op = getattr(_ops, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            _check_gradients(op, args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


# Negative views hold numbers with the other sign: a kernel would write half of a result --------


def _refuse_negative_views(name: str) -> None:
    def kernel(*args: Any) -> Any:
        names = [a.name for a in getattr(_ops, name).default._schema.arguments]
        view = next(
            n for n, a in zip(names, args, strict=False) if isinstance(a, Tensor) and a.is_neg()
        )
        raise RuntimeError(f"{name}: {view} must not be a negative view; call {view}.resolve_neg()")

    _library.impl(name, kernel, "Negative")


for _name in libraries.ops:
    _refuse_gradients(_name)
    _refuse_negative_views(_name)
