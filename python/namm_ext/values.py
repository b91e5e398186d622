"""The two values that every op and every policy works on: the store and the window of one layer.

A *segment* is one (batch row, KV head) pair, ``s = b * num_kv_heads + h``. Sizes: B batch rows, H
KV heads, S = B * H segments, G query heads per KV head, D ``head_dim``, Dv ``head_dim_v``, C rows
of the store, F numbers of state per token, R rows of the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """The store of one layer: all segments behind each other in flat tensors.

    Segment s owns the rows ``[cu_seqlens_k[s], cu_seqlens_k[s + 1])``, its *slot*, of which the
    first ``seqused_k[s]`` are live, oldest first. Rows behind them are room for new tokens: they
    may hold anything, NaN included, are never read, and are unspecified in results.

    Attributes:
        k: ``[C, D]`` keys after RoPE: float32, bfloat16 or float16; float64 for the reference.
        v: ``[C, Dv]`` values in the dtype of ``k``; Dv is 0 where keys are values too.
        pos: ``[C]`` int32 positions, increasing inside a segment.
        state: ``[C, F]`` float32, what a policy remembers of each token; F may be 0.
        cu_seqlens_k: ``[S + 1]`` int32 ends of the slots, starting with 0.
        seqused_k: ``[S]`` int32 live rows.

    Example:
        >>> i32 = lambda *n: torch.tensor(n, dtype=torch.int32)
        >>> k, pos = torch.zeros(5, 1), i32(3, 8, 0, 4, 0)
        >>> segments = Segments(k, k, pos, torch.zeros(5, 0), i32(0, 3, 5), i32(2, 1))
        >>> segments.live_rows()
        (tensor([0, 1, 3]), tensor([0, 0, 1]))
        >>> segments.newest()
        tensor([8, 4])
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    state: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that have a row per token: ``k, v, pos, state``."""
        return self.k, self.v, self.pos, self.state

    @property
    def capacity(self) -> int:
        """C."""
        return self.pos.shape[0]

    @property
    def with_values(self) -> Segments:
        """Itself; where Dv is 0, with its keys for values."""
        return self if self.v.shape[1] else self._replace(v=self.k)

    @property
    def live(self) -> Tensor:
        """``[C]`` bool: rows that hold a token."""
        mask = torch.zeros(self.capacity, dtype=torch.bool, device=self.pos.device)
        mask[self.live_rows()[0]] = True
        return mask

    def live_rows(self) -> tuple[Tensor, Tensor]:
        """Row numbers of all live tokens and the segment of each, int64, in order."""
        used = self.seqused_k.long()
        segment = torch.repeat_interleave(torch.arange(used.numel(), device=used.device), used)
        before = (used.cumsum(0) - used)[segment]
        offset = torch.arange(segment.numel(), device=used.device) - before
        return self.cu_seqlens_k[:-1].long()[segment] + offset, segment

    def newest(self) -> Tensor:
        """``[S]`` int64 position of each segment's newest token; unspecified where it has none."""
        last = self.cu_seqlens_k[:-1].long() + self.seqused_k.long() - 1
        return self.pos[last.clamp(min=0)].long()

    def slices(self) -> list[slice]:
        """The live rows of each segment as S slices. Waits for the device."""
        starts, used = self.cu_seqlens_k.tolist(), self.seqused_k.tolist()
        return [slice(a, a + n) for a, n in zip(starts, used, strict=False)]

    def part(self, begin: int, end: int) -> Segments:
        """Segments ``[begin, end)`` as a store of their own, on the same memory.

        Waits for the device.
        """
        cu = self.cu_seqlens_k[begin : end + 1]
        rows = slice(int(cu[0]), int(cu[-1]))
        tokens = (tensor[rows] for tensor in self.tokens)
        return Segments._make((*tokens, cu - cu[0], self.seqused_k[begin:end]))

    def clone(self) -> Segments:
        """A copy that shares no memory."""
        return Segments._make(tensor.clone() for tensor in self)

    def double(self) -> Segments:
        """A copy with keys, values and state in float64."""
        return Segments._make(t.double() if t.is_floating_point() else t.clone() for t in self)


class Window(NamedTuple):
    """The newest queries of one layer, from which the attention of a period is recomputed.

    The last 16 rows of the previous period, then the ``n_up`` of this one: R = 16 + n_up. Row i of
    batch row b stands at position ``pos_q[b] + i``.

    Attributes:
        q: ``[B, H * G, R, D]`` queries after RoPE in the dtype of the keys.
        lse: ``[B, H * G, R]`` float32 natural log-sum-exps of those rows, finite.
        pos_q: ``[B]`` int32, negative before the start of a sequence.
        active: ``[B]`` bool, batch rows to work on; the others stay as they are.
    """

    q: Tensor
    lse: Tensor
    pos_q: Tensor
    active: Tensor
