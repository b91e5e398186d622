"""A store as named tensors, for files."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..policy import Policy
from ..values import Segments
from .ledger import Ledger
from .planner import Planner
from .store import RaggedKV, Store

_PER_TOKEN = ("k", "v", "pos", "state")


def to_tensors(kv: RaggedKV) -> dict[str, Tensor]:
    """Everything needed to go on later: live rows only, sizes as tensors."""
    store = kv.store.segments
    starts = store.cu_seqlens_k.tolist()
    rows = [slice(a, a + n) for a, n in zip(starts, kv.lengths, strict=False)]
    overdue = (False,) * kv.batch_size if kv.overdue is None else kv.overdue.rows
    return {
        **{name: torch.cat([getattr(store, name)[r] for r in rows]) for name in _PER_TOKEN},
        "q_window": kv.q_window,
        "lse_window": kv.lse_window,
        "seen": torch.tensor(kv.seen),
        "kept": torch.tensor(kv.store.kept),
        "overdue": torch.tensor(overdue),
        "softmax_scale": torch.tensor(kv.softmax_scale, dtype=torch.float64),
        "num_updates": torch.tensor(kv.num_updates),
    }


def from_tensors(
    tensors: dict[str, Tensor],
    policy: Policy,
    *,
    device: torch.device,
    layer_idx: int,
    param_index: Tensor | None,
    ledger: Ledger,
) -> RaggedKV:
    """The store that ``to_tensors`` wrote; the policy must be the same."""
    q_window, seen, kept = tensors["q_window"], tensors["seen"], tensors["kept"]
    kv = RaggedKV(
        policy,
        batch_size=seen.numel(),
        num_kv_heads=kept.numel() // seen.numel(),
        num_heads=q_window.shape[1],
        head_dim=tensors["k"].shape[1],
        head_dim_v=tensors["v"].shape[1],
        softmax_scale=float(tensors["softmax_scale"]),
        dtype=tensors["k"].dtype,
        device=device,
        layer_idx=layer_idx,
        param_index=param_index,
        ledger=ledger,
    )
    kv.seen = tuple(seen.tolist())
    kv.num_updates = int(tensors["num_updates"])
    kv.store = replace(kv.store, kept=tuple(kept.tolist()))
    overdue = tuple(tensors["overdue"].tolist())
    if any(overdue):
        kv.overdue = Planner(policy.n_up).due(kv.seen, overdue, device)
    slots = tuple(n + kv.n_up for n in kv.store.kept)
    ends = [0, *accumulate(slots)]
    flat: dict[str, Tensor] = {}
    for name in _PER_TOKEN:
        source = tensors[name].to(device)
        flat[name] = source.new_empty(ends[-1], *source.shape[1:])
        for start, part in zip(ends, source.split(kv.lengths), strict=False):
            flat[name][start : start + part.shape[0]] = part
    int32: Any = {"dtype": torch.int32, "device": device}
    old = kv.held
    segments = Segments(
        **flat,
        cu_seqlens_k=torch.tensor(ends, **int32),
        seqused_k=torch.tensor(kv.lengths, **int32),
    )
    kv.store = Store(segments, slots, kv.store.kept)
    kv.q_window, kv.lse_window = q_window.to(device), tensors["lse_window"].to(device)
    kv.ledger.replace(old, kv.held)
    return kv
