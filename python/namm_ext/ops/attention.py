"""Attention over a store, and what a window of queries says about its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..values import Segments, Window
from .dispatch import call, kernels


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
    softcap: float = 0.0,
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
        softcap: bound of the scaled products x, ``softcap * tanh(x / softcap)``; 0 for none.

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
    if q.dtype is torch.float64:
        reference.attend_(
            out, lse, q, segments, first, num_new, pos_first, softmax_scale=softmax_scale,
            softcap=softcap,
        )  # fmt: skip
        return
    k, v, pos, _, cu_seqlens_k, seqused_k = segments
    call(
        kernels.attend_.default, out, lse, q, k, v, pos, cu_seqlens_k, seqused_k, first, num_new,
        pos_first, softmax_scale, softcap,
    )  # fmt: skip


def attend(
    q: Tensor,
    segments: Segments,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
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
        softcap: bound of the logits, as in :func:`attend_`; 0 for none.

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
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    lse = q.new_full((batch_size, num_heads, num_cols), -torch.inf, dtype=dtype)
    attend_(
        out, lse, q, segments, first, num_new, pos_first, softmax_scale=softmax_scale,
        softcap=softcap,
    )  # fmt: skip
    return out, lse


def record_(
    q_window: Tensor,
    lse_window: Tensor,
    q: Tensor,
    lse: Tensor,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
) -> None:
    """Put new queries and their log-sum-exps into the window of their layer, in place.

    Column ``first[b] + i`` of row b, for i below ``num_new[b]``, stands at position p =
    ``pos_first[b] + i`` and goes to window row ``16 + p % n_up``. The row is found from the
    position on the device: the same call is right at any time of a period.

    Args:
        q_window: ``[B, H * G, 16 + n_up, D]``, written; contiguous in its last dimension.
        lse_window: ``[B, H * G, 16 + n_up]`` float32, written.
        q: ``[B, H * G, L, D]`` queries after RoPE, any strides over the first three dimensions.
        lse: ``[B, H * G, L]`` float32, what :func:`attend_` wrote for them.
        first: ``[B]`` int32, first real column.
        num_new: ``[B]`` int32, number of real columns, none of them behind the end of the period.
        pos_first: ``[B]`` int32, position of the first of them.

    Raises:
        RuntimeError: if an argument differs from the above; nothing has been written then.

    Bit-exact on every device.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> q_window, lse_window = torch.zeros(1, 1, 20, 1), torch.zeros(1, 1, 20)
        >>> record_(q_window, lse_window, torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2), i32(0),
        ...         i32(2), i32(9))
        >>> lse_window[0, 0, 16:].tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    if q_window.dtype is torch.float64:
        reference.record_(q_window, lse_window, q, lse, first, num_new, pos_first)
        return
    call(kernels.record_.default, q_window, lse_window, q, lse, first, num_new, pos_first)


def spectrogram(
    window: Window,
    segments: Segments,
    *,
    softmax_scale: float,
    ema_coeff: float,
    softcap: float = 0.0,
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
        softcap: the bound attention used.

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
    if q.dtype is torch.float64 or state.dtype is torch.float64:
        return reference.spectrogram(
            window, segments, softmax_scale=softmax_scale, ema_coeff=ema_coeff, softcap=softcap
        )
    return call(
        kernels.spectrogram.default, q, lse, k, pos, state, cu_seqlens_k, seqused_k, pos_q, active,
        softmax_scale, ema_coeff, softcap,
    )  # fmt: skip


def attention_received(
    window: Window,
    segments: Segments,
    *,
    softmax_scale: float,
    first_row: int,
    softcap: float = 0.0,
) -> Tensor:
    """Attention each key received from the window's queries, summed.

    The group mean of P, as in :func:`spectrogram`, summed over window rows from ``first_row`` on.

    Args:
        window: as in :func:`spectrogram`.
        segments: the store; the state does not matter.
        softmax_scale: the factor attention used.
        first_row: in ``[0, 16 + n_up]``; 16 leaves the previous period's queries out.
        softcap: the bound attention used.

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
    if q.dtype is torch.float64:
        return reference.attention_received(
            window, segments, softmax_scale=softmax_scale, first_row=first_row, softcap=softcap
        )
    k, _, pos, _, cu_seqlens_k, seqused_k = segments
    return call(
        kernels.attention_received.default, q, lse, k, pos, cu_seqlens_k, seqused_k, pos_q, active,
        softmax_scale, first_row, softcap,
    )  # fmt: skip
