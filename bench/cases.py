"""Inputs of the CPU benchmarks, the plain PyTorch expressions, and the floors.

The plain expressions are what one writes first in PyTorch: dense logits, softmax, `torch.stft` and
so on, in the dtype of the model with float32 features. They see the same equal-length segments. For
attention the rival is ``scaled_dot_product_attention`` on an equally long dense cache (prefill) or
on the whole cache of which ours kept a part (decode).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention_cases import decode, prefill
from layers import EMA_COEFF, SHAPES, Layer, Shape
from namm_ext import reference
from timing import Case, Rotation, copies
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _check_features(layer: Layer) -> None:
    """The first segment against the law in float64."""
    few = Layer(min(layer.num_keys, 1024), layer.shape, "fp32")
    window = few.window._replace(q=few.window.q.double())
    exact = reference.spectrogram(
        window, few.store.double(), softmax_scale=few.scale, ema_coeff=EMA_COEFF
    )
    error = relative_error(few.spectrogram(), exact)
    assert error <= 1e-6, f"spectrogram: relative error {error:.1e}"
    if layer.num_keys <= 1024:
        error = relative_error(layer.spectrogram(), layer.plain_spectrogram())
        limit = 1e-4 if layer.store.k.dtype == torch.float32 else 2e-2
        assert error <= limit, f"spectrogram and plain expression differ by {error:.1e}"


def _check_scores(layer: Layer) -> None:
    n = min(layer.num_keys, 1024)
    few = Layer(n, Shape(1, 1, 1, 8, 16), "fp32")
    error = float((few.bam() - few.bam(reference, few.store.state.double())).abs().max())
    assert error <= 1e-4, f"bam_scores: error {error:.1e}"
    error = float((few.bam() - few.plain_bam(few.store.state)).abs().max())
    assert error <= 2e-4, f"bam_scores and plain expression differ by {error:.1e}"


def _check_compact(layer: Layer) -> None:
    state = layer.store.state
    keep, num_kept = layer.select(torch.randn(state.shape[0]))
    new = layer.compact(state, keep, num_kept)
    rows = torch.nonzero(keep).squeeze(1)
    want = layer.plain_compact(state, rows)
    first = int(num_kept[0])
    for ours, plain in zip(new.tokens, want, strict=True):
        assert torch.equal(ours[:first], plain[:first]), "compact differs from index_select"


OPS = (
    "features", "received", "bam", "select", "compact", "step", "prefill", "decode", "decode_all",
)  # fmt: skip


def make(op: str, num_keys: int, shape_name: str, dtype: str, plain: bool = True) -> Case:
    """The case of one op.

    Args:
        op: one of OPS; "decode" reads a quarter of the cache, "decode_all" all of it.
        num_keys: N, live rows per segment; of the whole cache for "decode".
        shape_name: key of SHAPES.
        dtype: key of DTYPES.
        plain: whether to offer the plain expression; it needs N^2 memory.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}: {op}")
    if op == "prefill":
        return prefill(num_keys, SHAPES[shape_name], shape_name, dtype)
    if op == "decode":
        return decode(num_keys, SHAPES[shape_name], shape_name, dtype, 0.25)
    if op == "decode_all":
        return decode(num_keys, SHAPES[shape_name], shape_name, dtype, 1.0)
    layer = Layer(num_keys, SHAPES[shape_name], dtype)
    s = layer.shape
    ours: Callable[[], Any]
    check: Callable[[], None]
    plain_fn: Callable[[], Any] | None = None
    floor: Callable[[], Any] | None = None
    floor_name, flops = "", 0
    if op in ("features", "step", "received"):
        q = layer.window.q.float().reshape(layer.segments, -1, s.head_dim)
        k = layer.store.k.float().view(layer.segments, num_keys, s.head_dim)
        out = torch.empty(q.shape[1], num_keys)

        def matmul() -> None:
            for i in range(layer.segments):
                torch.mm(q[i], k[i].T, out=out)

        floor, floor_name = matmul, "fp32 mm(Q, K^T)"
        flops = 2 * layer.segments * out.numel() * s.head_dim
    if op == "features":
        ours = Rotation([each.spectrogram for each in layer.copies()])
        plain_fn = layer.plain_spectrogram
        check = lambda: _check_features(layer)  # noqa: E731
    elif op == "received":
        ours = Rotation([each.received for each in layer.copies()])
        check = lambda: _check_features(layer)  # noqa: E731
    elif op == "bam":
        exps = torch.randn(min(num_keys * num_keys // 2, 2**20))
        turns = max(1, layer.segments * num_keys * num_keys // 2 // exps.numel())

        def exponentials() -> None:
            for _ in range(turns):
                torch.exp(exps)

        ours, plain_fn = layer.bam, lambda: layer.plain_bam(layer.store.state)
        floor, floor_name = exponentials, "its exponentials"
        check = lambda: _check_scores(layer)  # noqa: E731
    elif op in ("select", "compact"):
        scores = torch.randn(layer.segments * num_keys)
        keep, num_kept = layer.select(scores)
        rows = torch.nonzero(keep).squeeze(1)
        check = lambda: _check_compact(layer)  # noqa: E731
        if op == "select":
            ours, plain_fn = lambda: layer.select(scores), lambda: layer.plain_keep(scores)
        else:
            layers = layer.copies()
            ours = Rotation([partial(e.compact, e.store.state, keep, num_kept) for e in layers])
            plain_fn = Rotation([partial(e.plain_compact, e.store.state, rows) for e in layers])
            source = torch.zeros(rows.numel() * 2 * s.head_dim, dtype=layer.store.k.dtype)
            floor = Rotation([each.clone for each in copies(source)])
            floor_name = "copy of kept K, V"
    else:
        ours, plain_fn = layer.step, layer.plain_step

        def check() -> None:
            _check_features(layer)
            _check_scores(layer)
            _check_compact(layer)

    name = f"{op}-{shape_name}-N{num_keys}-{dtype}"
    return Case(
        name, ours, plain_fn if plain else None, floor, check, floor_name,
        layer.segments * num_keys, flops,
    )  # fmt: skip
