"""Ragged stores for the emulated op tests: dead rows are NaN, slots have room."""

from __future__ import annotations

import torch
from emulated import values


def make_store(
    lengths: list[list[int]],
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    num_state: int = 17,
    room: int = 5,
    num_tail: int = 0,
    seed: int = 0,
) -> values.Segments:
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
    return values.Segments(k, v, pos, state, cu, used)
