"""What changes which rows a store holds."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..values import Segments
from .dispatch import call, kernels


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
    if k.dtype is torch.float64 or state.dtype is torch.float64:
        reference.append_(segments, k_new, v_new, first, num_new, pos_first)
        return
    call(
        kernels.append_.default, k, v, pos, state, seqused_k, cu_seqlens_k, k_new, v_new, first,
        num_new, pos_first,
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
    if k.dtype is torch.float64 or state.dtype is torch.float64:
        return reference.compact(segments, keep, num_kept, cu_seqlens_new, capacity=capacity)
    tokens = call(
        kernels.compact.default, k, v, pos, state, cu_seqlens_k, seqused_k, keep, num_kept,
        cu_seqlens_new, capacity,
    )  # fmt: skip
    return Segments._make((*tokens, cu_seqlens_new, num_kept))
