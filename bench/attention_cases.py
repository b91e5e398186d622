"""The cases of attention: new tokens on a ragged store, one or a chunk of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from layers import DTYPES, Shape
from namm_ext import ops, reference, testing
from timing import Case, Rotation, copies, num_copies
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def _double(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "q": args["q"].double(), "segments": args["segments"].double()}


def _attend_args(
    lengths: list[int], shape: Shape, num_new: int, dtype: str
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments of ``attend_`` for new tokens on segments of these lengths, and its outputs."""
    kind = DTYPES[dtype]
    store = testing.ragged_store(
        lengths, head_dim=shape.head_dim, num_state=0, room=num_new, dtype=kind
    )
    generator = torch.Generator().manual_seed(1)
    batch_size, heads = shape.batch_size, shape.num_kv_heads * shape.num_groups
    q = torch.randn(batch_size, heads, num_new, shape.head_dim, generator=generator).to(kind)
    kv = torch.randn(
        2, batch_size, shape.num_kv_heads, num_new, shape.head_dim, generator=generator
    ).to(kind)
    first = torch.zeros(batch_size, dtype=torch.int32)
    count = torch.full((batch_size,), num_new, dtype=torch.int32)
    position = testing.newest_of_rows(store, batch_size) + 1
    ops.append_(store, kv[0], kv[1], first, count, position)
    args = {
        "q": q, "segments": store, "first": first, "num_new": count, "pos_first": position,
        "softmax_scale": shape.head_dim**-0.5,
    }  # fmt: skip
    out = torch.zeros(batch_size, num_new, heads, shape.head_dim, dtype=kind)
    return args, out, torch.zeros(batch_size, heads, num_new)


def _attend_rotation(args: dict[str, Any], out: Tensor, lse: Tensor) -> Rotation:
    store = args["segments"]
    stores = [store] + [store.clone() for _ in range(num_copies(store.k, store.v) - 1)]
    return Rotation([partial(ops.attend_, out, lse, **{**args, "segments": s}) for s in stores])


def _live_copy(args: dict[str, Any]) -> Rotation:
    """Copies of the live bytes of K and V: what cannot be avoided."""
    store = args["segments"]
    live = int(store.seqused_k.sum()) * store.k.shape[1]
    sources = copies(torch.zeros(2 * live, dtype=store.k.dtype))
    target = torch.empty_like(sources[0])
    return Rotation([partial(target.copy_, source) for source in sources])


def prefill(
    cached: int, shape: Shape, shape_name: str, dtype: str, num_new: int | None = None
) -> Case:
    """A chunk of new tokens on ``cached`` ones in every segment, against the same densely.

    Args:
        cached: rows per segment before.
        shape: sizes of the layer.
        shape_name: for the name of the case.
        dtype: key of DTYPES.
        num_new: new tokens per batch row; None: as many as between two updates.
    """
    columns = shape.n_up if num_new is None else num_new
    segments, keys = shape.batch_size * shape.num_kv_heads, cached + columns
    args, out, lse = _attend_args([cached] * segments, shape, columns, dtype)
    dense = (shape.batch_size, shape.num_kv_heads, keys, shape.head_dim)
    k, v = args["segments"].k.view(dense), args["segments"].v.view(dense)
    mask = torch.ones(columns, keys, dtype=torch.bool).tril(cached)

    def rival() -> Tensor:
        return scaled_dot_product_attention(
            args["q"], k, v, attn_mask=mask, enable_gqa=shape.num_groups > 1
        )

    def check() -> None:
        want, _ = reference.attend(**_double(args))
        ops.attend_(out, lse, **args)
        testing.assert_no_worse_than(out, rival().transpose(1, 2), want)

    return Case(
        f"prefill-{shape_name}-N{cached}-{dtype}", lambda: ops.attend_(out, lse, **args), rival,
        _live_copy(args), check, "copy of live K, V", segments * keys,
        4 * segments * shape.num_groups * shape.head_dim * columns * keys,
    )  # fmt: skip


def decode(context: int, shape: Shape, shape_name: str, dtype: str, kept: float) -> Case:
    """One token on a ragged cache of ``kept * context`` rows on average, against the whole cache.

    Args:
        context: rows per segment of the whole cache.
        shape: sizes of the layer.
        shape_name: for the name of the case.
        dtype: key of DTYPES.
        kept: average part of it that is left; segments lie between half and one and a half of it.
            1.0: all of it, equally long.
    """
    segments = shape.batch_size * shape.num_kv_heads
    steps = [0.5 + i / max(1, segments - 1) for i in range(segments)]
    lengths = [context - 1 if kept == 1.0 else int(kept * context * step) for step in steps]
    args, out, lse = _attend_args(lengths, shape, 1, dtype)
    whole = (shape.batch_size, shape.num_kv_heads, context, shape.head_dim)
    k, v = (torch.randn(whole).to(DTYPES[dtype]) for _ in range(2))

    def rival(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(args["q"], k, v, enable_gqa=shape.num_groups > 1)

    def check() -> None:
        same, _ = reference.attend(**args)
        want, _ = reference.attend(**_double(args))
        ops.attend_(out, lse, **args)
        testing.assert_no_worse_than(out, same, want)

    op = "decode" if kept < 1.0 else "decode_all"
    return Case(
        f"{op}-{shape_name}-N{context}-{dtype}", _attend_rotation(args, out, lse),
        Rotation([partial(rival, k, v) for k, v in copies(k, v)]), _live_copy(args), check,
        "copy of live K, V", segments * context,
        4 * shape.num_groups * shape.head_dim * sum(lengths),
    )  # fmt: skip
