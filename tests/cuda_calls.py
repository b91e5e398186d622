"""Calls of every op with aligned inputs, and what the law says to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from namm_ext import ops, reference, testing
from namm_ext.values import Segments
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: lengths of (batch row, KV head) segments; parts of a split attention have 256 keys.
RAGGED = (700, 33, 256, 1025)


def to_device(value: Any, device: str) -> Any:
    """Tensors of a (nested) structure, copied."""
    return tree_map_only(Tensor, lambda t: t.to(device, copy=True), value)


@dataclass
class Call:
    """One op call; ``live``: the rows of its results that mean something, None for all.

    An op that writes in place gives all its arguments as results.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    live: Tensor | None

    def run(self, device: str, function: Callable | None = None) -> list[Tensor]:
        """Results on the CPU."""
        args = to_device(self.args, device)
        function = function or getattr(ops, self.name)
        got = function(*args, **to_device(self.kwargs, device))
        return [t.cpu() for t in tree_leaves(args if got is None else got)]

    def select(self, results: list[Tensor]) -> list[Tensor]:
        """The part of the results to compare."""
        if self.live is None:
            return results
        size = self.live.numel()
        return [t[self.live] if t.shape[:1] == (size,) else t for t in results]


def store_of(head_dim: int, dtype: torch.dtype, lengths=RAGGED, room: int = 40) -> Segments:
    return testing.ragged_store(lengths, head_dim=head_dim, dtype=dtype, room=room)


def aligned(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in values.items()}


def attend_call(head_dim: int, groups: int, dtype: torch.dtype, num_new: tuple[int, int]) -> Call:
    store = store_of(head_dim, dtype, room=max(num_new))
    new = aligned(testing.new_tokens(store, num_new, num_groups=groups, num_cols=max(num_new)))
    columns = (new["first"], new["num_new"], new["pos_first"])
    ops.append_(store, new["k_new"], new["v_new"], *columns)
    args = (new["q"], store, *columns)
    return Call("attend", args, {"softmax_scale": head_dim**-0.5}, None)


def append_call(head_dim: int, dtype: torch.dtype) -> Call:
    store = store_of(head_dim, dtype, room=70)
    new = aligned(testing.new_tokens(store, (70, 3), num_cols=70))
    columns = (new["first"], new["num_new"], new["pos_first"])
    return Call("append_", (store, new["k_new"], new["v_new"], *columns), {}, None)


def record_call(head_dim: int, dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 6, 70, head_dim, generator=generator).to(dtype)
    lse = torch.randn(2, 6, 70, generator=generator)
    window = torch.zeros(2, 6, 16 + 128, head_dim, dtype=dtype), torch.zeros(2, 6, 16 + 128)
    columns = [torch.tensor(n, dtype=torch.int32) for n in ((0, 3), (70, 1), (58, 300))]
    return Call("record_", (*window, q, lse, *columns), {}, None)


def window_call(name: str, head_dim: int, groups: int, dtype: torch.dtype, n_up: int = 64) -> Call:
    store = store_of(head_dim, dtype)
    scale = head_dim**-0.5
    window = testing.window(store, n_up=n_up, num_groups=groups, scale=scale)
    window = window._make(t.contiguous() for t in window)
    option = {"ema_coeff": 0.99} if name == "spectrogram" else {"first_row": 16}
    return Call(name, (window, store), {"softmax_scale": scale, **option}, store.live)


def score_call(name: str, spread: float = 0.2) -> Call:
    store = store_of(8, FP32)
    options: dict[str, Any] = {"log_transform": False, "log_eps": 1e-6}
    num_params = reference.NUM_BAM_PARAMS
    if name == "mlp_scores":
        mlp = {"hidden": 25, "depth": 2, "bias": True, "residual_first": True}
        options |= mlp
        num_params = reference.num_mlp_params(25, 2, True)
    params = testing.bank(3, num_params) * (spread / 0.2)
    args = (
        store, params, torch.tensor([2, 0], dtype=torch.int32), torch.full((17,), 1.5),
        torch.full((17,), 0.7), torch.tensor([True, True]),
    )  # fmt: skip
    return Call(name, args, options, store.live)


def gate_call(head_dim: int, dtype: torch.dtype, num_new: int = 33) -> Call:
    store = testing.same_newest(store_of(head_dim, dtype), num_new)
    args = (
        store, torch.tensor([True, True]), testing.bank(2, 4 * head_dim + 4), torch.ones(2),
    )  # fmt: skip
    return Call("gate_", args, {"num_new": num_new, "rotary_dim": head_dim}, store.live)


RULES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "budget": {"cache_size": 100},
    "fill": {"fill": True},
    "fill_budget": {"fill": True, "cache_size": 300},
    "layer": {"cache_size": 100, "budget": "per_layer"},
    "sinks_recent": {"cache_size": 50, "sink_tokens": 20, "recent_tokens": 30},
    "no_threshold": {"threshold": -float("inf"), "cache_size": 256},
}


def select_call(rule: str, ties: bool) -> Call:
    store = store_of(8, FP32, (3000, 33, 0, 1025))
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(store.k.shape[0], generator=generator)
    scores = (scores * 2).round() / 2 if ties else scores
    kwargs = {
        "threshold": 0.0, "cache_size": -1, "budget": "per_head", "fill": False,
        "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0, **RULES[rule],
    }  # fmt: skip
    active = torch.tensor([True, True])
    return Call("select", (scores, store, active), kwargs, store.live)


def compact_call(head_dim: int, dtype: torch.dtype) -> Call:
    store = store_of(head_dim, dtype, (3000, 33, 0, 1025))
    generator = torch.Generator().manual_seed(5)
    keep = (torch.rand(store.k.shape[0], generator=generator) < 0.4).to(torch.uint8)
    keep[~store.live] = 1
    num_kept = torch.tensor([int(keep[r].sum()) for r in store.slices()], dtype=torch.int32)
    cu_new = torch.cat([torch.zeros(1, dtype=torch.int64), num_kept.cumsum(0)]).to(torch.int32)
    return Call("compact", (store, keep, num_kept, cu_new), {"capacity": int(cu_new[-1])}, None)


def law(call: Call, dtype: torch.dtype, round_to: torch.dtype | None = None) -> list[Tensor]:
    """The reference on the CPU with floating-point arguments in ``dtype``."""
    args = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, call.args)
    kwargs = dict(call.kwargs)
    if round_to is not None:
        kwargs["round_to"] = round_to
    return tree_leaves(getattr(reference, call.name)(*args, **kwargs))
