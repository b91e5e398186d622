"""What a layer shows a policy at an update, made up, and policies for it: no model, no cache."""

from __future__ import annotations

import dataclasses
import math

import torch
from namm_ext import NAMM, Budget, NAMMConfig, reference
from namm_ext.policy import UpdateContext
from namm_ext.values import Segments, Window
from torch import Tensor

NONFINITE = torch.zeros(4172)
NONFINITE[[1, 5]] = torch.tensor([math.nan, math.inf])

SPARE = 3  # free slots behind the live rows of a segment


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def context(
    dtype: torch.dtype = torch.float32,
    num_heads: int = 2,
    n_up: int = 16,
    num_keys: int = 40,
    layer_idx: int = 4,
    due: tuple[bool, ...] = (True, False),
    seen: tuple[int, ...] | None = None,
) -> UpdateContext:
    """Rows after their second period, each without its first 5 tokens; some are not due."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    num_rows = len(due)
    num_segments = num_rows * num_heads
    room = num_keys + SPARE
    capacity = num_segments * room
    pos = torch.full((num_segments, room), -1, dtype=torch.int32)
    pos[:, :num_keys] = torch.arange(num_keys) + 5
    return UpdateContext(
        window=Window(
            q=rand(num_rows, 2 * num_heads, 16 + n_up, 8),
            lse=rand(num_rows, 2 * num_heads, 16 + n_up).abs().float().to(dtype) + 3,
            pos_q=ints(*[num_keys + 5 - n_up - 16] * num_rows),
            active=torch.tensor(due),
        ),
        segments=Segments(
            k=rand(capacity, 8),
            v=rand(capacity, 8),
            pos=pos.flatten(),
            state=rand(capacity, 17).abs(),
            cu_seqlens_k=torch.arange(num_segments + 1, dtype=torch.int32) * room,
            seqused_k=torch.full((num_segments,), num_keys, dtype=torch.int32),
        ),
        softmax_scale=0.3,
        layer_idx=layer_idx,
        num_kv_heads=num_heads,
        param_index=ints(*range(num_rows)),
        seen=(num_keys + 5,) * num_rows if seen is None else seen,
        due=due,
    )


def kept_positions(keep: Tensor, ctx: UpdateContext) -> list[list[int]]:
    """Positions that stay, of each segment."""
    pos = ctx.segments.pos
    return [pos[rows][keep[rows].bool()].tolist() for rows in ctx.segments.slices()]


def expected_state(ctx: UpdateContext, ema_coeff: float) -> Tensor:
    return reference.spectrogram(ctx.window, ctx.segments, softmax_scale=0.3, ema_coeff=ema_coeff)


def with_due(ctx: UpdateContext, due: tuple[bool, ...]) -> UpdateContext:
    window = ctx.window._replace(active=torch.tensor(due))
    return dataclasses.replace(ctx, window=window, due=due)


def random_namm(budget: Budget | None = None, **changes) -> NAMM:
    settings = NAMMConfig(**changes)
    params = torch.randn(settings.num_params) * 0.3
    return NAMM(settings, params, torch.rand(17), torch.rand(17) + 0.1, 12, budget=budget)
