"""A store as named tensors, for files."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..policy import Policy
from ..values import Segments
from .ledger import Ledger
from .planner import CARRY, Planner
from .store import RaggedKV
from .undo import Store, lasting

_PER_TOKEN = ("k", "v", "pos", "state")
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def to_tensors(kv: RaggedKV) -> dict[str, Tensor]:
    """Everything needed to go on later: live rows only, sizes as tensors."""
    store = kv.store.segments
    starts = store.cu_seqlens_k.tolist()
    rows = [slice(a, a + n) for a, n in zip(starts, kv.lengths, strict=False)]
    return {
        **{name: torch.cat([getattr(store, name)[r] for r in rows]) for name in _PER_TOKEN},
        "q_window": kv.q_window,
        "lse_window": kv.lse_window,
        "seen": torch.tensor(kv.seen),
        "kept": torch.tensor(kv.store.kept),
        "overdue": torch.tensor(kv.overdue_rows),
        "softmax_scale": torch.tensor(kv.softmax_scale, dtype=torch.float64),
        "num_updates": torch.tensor(kv.num_updates),
        **({"softcap": torch.tensor(kv.softcap, dtype=torch.float64)} if kv.softcap else {}),
    }


@lasting
def from_tensors(
    tensors: dict[str, Tensor],
    policy: Policy,
    *,
    device: torch.device,
    layer_idx: int,
    param_index: Tensor | None,
    ledger: Ledger,
    num_layers: int = 1,
) -> RaggedKV:
    """The store that ``to_tensors`` wrote; the policy must be the same.

    Raises:
        ValueError: if the tensors are not what ``to_tensors`` can have written.
    """
    _check_sizes(tensors)
    q_window, seen, kept = tensors["q_window"], tensors["seen"], tensors["kept"]
    kv = RaggedKV(
        policy,
        batch_size=seen.numel(),
        num_kv_heads=kept.numel() // seen.numel(),
        num_heads=q_window.shape[1],
        head_dim=tensors["k"].shape[1],
        head_dim_v=tensors["v"].shape[1],
        softmax_scale=float(tensors["softmax_scale"]),
        softcap=float(tensors.get("softcap", 0.0)),
        dtype=tensors["k"].dtype,
        device=device,
        layer_idx=layer_idx,
        param_index=param_index,
        ledger=ledger,
        num_layers=num_layers,
    )
    kv.seen = tuple(seen.tolist())
    kv.num_updates = int(tensors["num_updates"])
    kept_rows = tuple(kept.tolist())
    kv.overdue = Planner(policy.n_up).due(kv.seen, tuple(tensors["overdue"].tolist()), device)
    kv.store = Store(kv.store.segments, kv.store.slots, kept_rows)
    _check_tokens(tensors, kv)
    slots = tuple(n + kv.n_up for n in kept_rows)
    ends = [0, *accumulate(slots)]
    flat: dict[str, Tensor] = {}
    for name in _PER_TOKEN:
        source = tensors[name].to(device)
        flat[name] = source.new_empty(ends[-1], *source.shape[1:])
        for start, part in zip(ends, source.split(kv.lengths), strict=False):
            flat[name][start : start + part.shape[0]] = part
    int32: Any = {"dtype": torch.int32, "device": device}
    segments = Segments(
        **flat,
        cu_seqlens_k=torch.tensor(ends, **int32),
        seqused_k=torch.tensor(kv.lengths, **int32),
    )
    kv.store = Store(segments, slots, kept_rows)
    # A copy: a mapped file must not be what the window is written to.
    kv.q_window = q_window.to(device, copy=True)
    kv.lse_window = tensors["lse_window"].to(device, copy=True)
    kv.ledger.replace((kv.ledger.kv, kv.ledger.memory), kv.held)
    return kv


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _check_sizes(tensors: dict[str, Tensor]) -> None:
    """What is needed to make an empty store."""
    counts = {"seen": 1, "kept": 1, "overdue": 1, "softmax_scale": 0, "num_updates": 0}
    dims = {"k": 2, "v": 2, "pos": 1, "state": 2, "q_window": 4, "lse_window": 3, **counts}
    for name, dim in dims.items():
        _require(name in tensors, f"{name} is missing")
        _require(tensors[name].dim() == dim, f"{name} must have {dim} dimensions")
    for name in ("seen", "kept", "num_updates"):
        _require(tensors[name].dtype == torch.int64, f"{name} must be int64")
        _require(bool((tensors[name] >= 0).all()), f"{name} must not be negative")
        _require(bool((tensors[name] < 2**31).all()), f"{name} must be below 2^31")
    for name in ("k", "v", "state", "q_window", "lse_window", "softmax_scale"):
        _require(tensors[name].dtype in _REAL, f"{name} must be a float tensor")
    _require(tensors["overdue"].dtype == torch.bool, "overdue must be bool")
    _require(tensors["pos"].dtype == torch.int32, "pos must be int32")
    batch_size = tensors["seen"].numel()
    _require(batch_size > 0, "seen must not be empty")
    _require(tensors["overdue"].numel() == batch_size, "overdue must have one entry per row")
    segments = tensors["kept"].numel()
    _require(segments > 0 and segments % batch_size == 0, "kept must have entries for every row")
    scale = float(tensors["softmax_scale"])
    _require(math.isfinite(scale) and scale > 0, "softmax_scale must be finite and positive")
    if "softcap" in tensors:
        _require(tensors["softcap"].dim() == 0, "softcap must have 0 dimensions")
        _require(tensors["softcap"].dtype in _REAL, "softcap must be a float tensor")
        cap = float(tensors["softcap"])
        _require(math.isfinite(cap) and cap > 0, "softcap must be finite and positive")
    _require(tensors["v"].shape[-1] <= 2**16, "v must have a head dimension")
    for name in ("k", "q_window"):
        _require(0 < tensors[name].shape[-1] <= 2**16, f"{name} must have a head dimension")
    heads = tensors["q_window"].shape[1]
    _require(
        heads > 0 and heads % (segments // batch_size) == 0,
        "q_window must have a multiple of the KV heads",
    )


def _check_tokens(tensors: dict[str, Tensor], kv: RaggedKV) -> None:
    """The tensors against the store they are for."""
    for seen, due in zip(kv.seen, kv.overdue_rows, strict=True):
        _require(not due or (seen > 0 and seen % kv.n_up == 0), "overdue must be at a period's end")
    empty, total = kv.store.segments, sum(kv.lengths)
    for name in _PER_TOKEN:
        wanted, got = getattr(empty, name), tensors[name]
        _require(
            got.dtype == wanted.dtype and list(got.shape) == [total, *wanted.shape[1:]],
            f"{name} must be {wanted.dtype} {[total, *wanted.shape[1:]]}, got {got.dtype} "
            f"{list(got.shape)}",
        )
    for name in ("q_window", "lse_window"):
        wanted, got = getattr(kv, name), tensors[name]
        _require(
            got.dtype == wanted.dtype and got.shape == wanted.shape,
            f"{name} must be {wanted.dtype} {list(wanted.shape)}, got {got.dtype} "
            f"{list(got.shape)}",
        )
    for row, (seen, due) in enumerate(zip(kv.seen, kv.overdue_rows, strict=True)):
        since = kv.n_up if due else seen % kv.n_up
        mine = slice(row * kv.num_kv_heads, (row + 1) * kv.num_kv_heads)
        for pos in tensors["pos"].split(kv.lengths)[mine]:
            _require(
                torch.equal(pos[pos.numel() - since :].long(), torch.arange(seen - since, seen))
                and bool((pos[1:] > pos[:-1]).all())
                and not bool((pos[:1] < 0).any()),
                f"pos must increase and end with the newest of {seen} tokens",
            )
        used = slice(0, CARRY + since)
        for name in ("q_window", "lse_window"):
            _require(bool(tensors[name][row, :, used].isfinite().all()), f"{name} must be finite")
    for name in ("k", "v", "state"):
        _require(bool(tensors[name].isfinite().all()), f"{name} must be finite")
