"""Ragged stores for the emulated op tests: dead rows are NaN, slots have room."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Store:
    """One layer; the fields are named as in ``params.h``."""

    k: Tensor
    v: Tensor
    pos: Tensor
    state: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    batch_size: int

    @property
    def capacity(self) -> int:
        """Rows of the store."""
        return self.k.shape[0]

    def clone(self) -> Store:
        """A copy that shares nothing."""
        tensors = (self.k, self.v, self.pos, self.state, self.cu_seqlens_k, self.seqused_k)
        return Store(*(t.clone() for t in tensors), self.batch_size)

    def live_rows(self) -> Tensor:
        """Numbers of the live rows."""
        cu, used = self.cu_seqlens_k.tolist(), self.seqused_k.tolist()
        rows = [torch.arange(c, c + n) for c, n in zip(cu, used, strict=False)]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)


def make_store(
    lengths: list[list[int]],
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    num_state: int = 17,
    room: int = 5,
    num_tail: int = 0,
    seed: int = 0,
) -> Store:
    """A store whose segment (b, h) has ``lengths[b][h]`` live rows.

    Positions have gaps, except the last ``num_tail``, which are consecutive and end at the same
    position in all segments. Slots have ``room`` or one more dead rows.
    """
    gen = torch.Generator().manual_seed(seed)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    used = torch.tensor([n for row in lengths for n in row], dtype=torch.int32)
    slots = used + room + torch.arange(used.numel()) % 2
    cu = torch.cat([torch.zeros(1), slots.cumsum(0)]).to(torch.int32)
    capacity = int(cu[-1])
    k = torch.full((capacity, head_dim), float("nan"), dtype=dtype)
    v = torch.full((capacity, head_dim_v), float("nan"), dtype=dtype)
    pos = torch.full((capacity,), -(2**31), dtype=torch.int32)
    state = torch.full((capacity, num_state), float("nan"))
    seen = 2 * int(used.max()) + num_tail + 3 if used.numel() else 0
    for s, length in enumerate(used.tolist()):
        live = slice(int(cu[s]), int(cu[s]) + length)
        k[live] = torch.randn(length, head_dim, generator=gen).to(dtype)
        v[live] = torch.randn(length, head_dim_v, generator=gen).to(dtype)
        state[live] = torch.rand(length, num_state, generator=gen)
        tail = min(num_tail, length)
        old = torch.randperm(seen - num_tail, generator=gen)[: length - tail].sort().values
        pos[live] = torch.cat([old, torch.arange(seen - tail, seen)]).to(torch.int32)
    return Store(k, v, pos, state, cu, used, len(lengths))
