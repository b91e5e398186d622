"""Inputs of the CPU benchmarks, the plain PyTorch expressions, and the floors.

The plain expressions are what one writes first in PyTorch: dense logits, softmax, `torch.stft` and
so on, in the dtype of the model with float32 features. They see the same equal-length segments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from namm_ext import ops, reference
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMA_COEFF = 0.99


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: batch rows, KV heads, group, head_dim, period."""

    batch_size: int
    num_kv_heads: int
    num_groups: int
    head_dim: int
    n_up: int


LLAMA = Shape(1, 8, 4, 128, 512)
BUNDLED = Shape(128, 2, 2, 32, 64)
SHAPES = {"llama": LLAMA, "bundled": BUNDLED}


@dataclass
class Case:
    """One thing to time, its plain expression and its floor (None: not possible, or none)."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any] | None
    floor: Callable[[], Any] | None
    check: Callable[[], None]
    floor_name: str


class Layer:
    """The store and the window of one layer after ``n_up`` new tokens; N rows per segment."""

    def __init__(self, num_keys: int, shape: Shape, dtype: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        s = shape
        self.shape, self.num_keys = shape, num_keys
        self.segments = s.batch_size * s.num_kv_heads
        self.rows = reference.CARRY + s.n_up
        rows, total = self.rows, self.segments * num_keys
        heads = s.num_kv_heads * s.num_groups
        kind = DTYPES[dtype]
        self.scale = s.head_dim**-0.5
        self.k = torch.randn(total, s.head_dim, generator=generator).to(kind)
        self.v = torch.randn(total, s.head_dim, generator=generator).to(kind)
        q = torch.randn(s.batch_size, heads, rows, s.head_dim, generator=generator) * 2
        self.q = q.to(kind)
        self.pos = torch.arange(num_keys, dtype=torch.int32).repeat(self.segments)
        self.cu = torch.arange(self.segments + 1, dtype=torch.int32) * num_keys
        self.used = torch.full((self.segments,), num_keys, dtype=torch.int32)
        self.pos_q = torch.full((s.batch_size,), num_keys - rows, dtype=torch.int32)
        self.active = torch.ones(s.batch_size, dtype=torch.bool)
        self.state = torch.rand(total, reference.NUM_BINS, generator=generator) * 0.05
        self.params = torch.randn(1, reference.NUM_BAM_PARAMS, generator=generator) * 0.2
        self.param_index = torch.zeros(s.batch_size, dtype=torch.int32)
        self.mean = torch.full((reference.NUM_BINS,), 0.02)
        self.var = torch.full((reference.NUM_BINS,), 1e-3)
        self.lse = torch.empty(s.batch_size, heads, rows)
        for b in range(s.batch_size):
            for head in range(heads):
                logits = self._logits(b, head // s.num_groups, self.q[b, head].float())
                self.lse[b, head] = torch.logsumexp(logits, -1)

    def _keys(self, b: int, h: int) -> Tensor:
        start = (b * self.shape.num_kv_heads + h) * self.num_keys
        return self.k[start : start + self.num_keys]

    def _logits(self, b: int, h: int, q: Tensor) -> Tensor:
        logits = (q @ self._keys(b, h).to(q.dtype).T) * self.scale
        rows = torch.arange(self.num_keys - self.rows, self.num_keys)
        hidden = torch.arange(self.num_keys) > rows[:, None]
        return logits.masked_fill_(hidden, -math.inf)

    # -------- ours

    def spectrogram(self, op: Any = ops, **double: Tensor) -> Tensor:
        names = {"q": self.q, "k": self.k, "state": self.state, **double}
        return op.spectrogram(
            names["q"], self.lse, names["k"], self.pos, names["state"], self.cu, self.used,
            self.pos_q, self.active, softmax_scale=self.scale, ema_coeff=EMA_COEFF,
        )  # fmt: skip

    def received(self) -> Tensor:
        return ops.attention_received(
            self.q, self.lse, self.k, self.pos, self.cu, self.used, self.pos_q, self.active,
            softmax_scale=self.scale, first_row=reference.CARRY,
        )  # fmt: skip

    def bam(self, op: Any = ops, state: Tensor | None = None) -> Tensor:
        return op.bam_scores(
            self.state if state is None else state, self.pos, self.cu, self.used, self.params,
            self.param_index, self.mean, self.var, self.active, log_transform=False, log_eps=1e-6,
        )  # fmt: skip

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return ops.select(
            scores, self.pos, self.cu, self.used, self.active, threshold=-math.inf,
            cache_size=self.num_keys // 2, budget="per_head", fill=False, protect_newest=True,
            sink_tokens=0, recent_tokens=0,
        )  # fmt: skip

    def compact(self, state: Tensor, keep: Tensor, num_kept: Tensor) -> tuple[Tensor, ...]:
        new = torch.zeros(self.segments + 1, dtype=torch.int32)
        new[1:] = torch.cumsum(num_kept + self.shape.n_up, 0)
        return ops.compact(
            self.k, self.v, self.pos, state, self.cu, self.used, keep, num_kept, new,
            capacity=int(new[-1]),
        )  # fmt: skip

    def step(self) -> tuple[Tensor, ...]:
        state = self.spectrogram()
        return self.compact(state, *self.select(self.bam(state=state)))

    # -------- plain PyTorch

    def plain_spectrogram(self) -> Tensor:
        s, window = self.shape, reference.hann_window()
        q = self.q.view(s.batch_size, s.num_kv_heads, s.num_groups, self.rows, s.head_dim)
        k = self.k.view(s.batch_size, s.num_kv_heads, 1, self.num_keys, s.head_dim)
        logits = (q @ k.transpose(-1, -2)) * self.scale
        rows = torch.arange(self.num_keys - self.rows, self.num_keys)
        hidden = torch.arange(self.num_keys) > rows[:, None]
        attn = logits.masked_fill_(hidden, -math.inf).softmax(-1, dtype=torch.float32)
        columns = attn.mean(2).flatten(0, 1).transpose(-1, -2).flatten(0, 1)
        frames = torch.stft(
            columns, reference.N_FFT, reference.HOP, window=window, center=False,
            return_complex=True,
        ).abs()  # fmt: skip
        alpha = EMA_COEFF**reference.HOP
        count = frames.shape[-1]
        weight = alpha ** torch.arange(count - 1, -1, -1, dtype=torch.float32)
        return (1 - alpha) * (frames @ weight) + alpha**count * self.state

    def plain_bam(self, state: Tensor) -> Tensor:
        features = reference.token_features(
            state[: self.num_keys], self.pos[: self.num_keys], self.mean, self.var, False, 1e-6
        )[:, : reference.NUM_RECENCY].expand(self.segments, -1, -1)
        z = reference.normalise(state, self.mean, self.var).view(self.segments, self.num_keys, -1)
        return reference.bam(torch.cat([features, z], -1), self.params[0]).flatten()

    def plain_keep(self, scores: Tensor) -> Tensor:
        kept = scores.view(self.segments, -1).topk(self.num_keys // 2, dim=-1).indices
        kept = kept.sort(-1).values
        return (kept + torch.arange(self.segments)[:, None] * self.num_keys).flatten()

    def plain_compact(self, state: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(0, rows) for x in (self.k, self.v, self.pos, state))

    def plain_step(self) -> tuple[Tensor, ...]:
        state = self.plain_spectrogram()
        return self.plain_compact(state, self.plain_keep(self.plain_bam(state)))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _check_features(layer: Layer) -> None:
    """The first segment against the law in float64."""
    few = Layer(min(layer.num_keys, 1024), layer.shape, "fp32")
    exact = few.spectrogram(reference, q=few.q.double(), k=few.k.double(), state=few.state.double())
    error = relative_error(few.spectrogram(), exact)
    assert error <= 1e-6, f"spectrogram: relative error {error:.1e}"
    if layer.num_keys <= 1024:
        error = relative_error(layer.spectrogram(), layer.plain_spectrogram())
        limit = 1e-4 if layer.k.dtype == torch.float32 else 2e-2
        assert error <= limit, f"spectrogram and plain expression differ by {error:.1e}"


def _check_scores(layer: Layer) -> None:
    n = min(layer.num_keys, 1024)
    few = Layer(n, Shape(1, 1, 1, 8, 16), "fp32")
    error = float((few.bam() - few.bam(reference, few.state.double())).abs().max())
    assert error <= 1e-4, f"bam_scores: error {error:.1e}"
    error = float((few.bam() - few.plain_bam(few.state)).abs().max())
    assert error <= 2e-4, f"bam_scores and plain expression differ by {error:.1e}"


def _check_compact(layer: Layer) -> None:
    scores = torch.randn(layer.state.shape[0])
    keep, num_kept = layer.select(scores)
    new = layer.compact(layer.state, keep, num_kept)
    rows = torch.nonzero(keep).squeeze(1)
    want = layer.plain_compact(layer.state, rows)
    first = int(num_kept[0])
    for ours, plain in zip(new, want, strict=True):
        assert torch.equal(ours[:first], plain[:first]), "compact differs from index_select"


def make(op: str, num_keys: int, shape_name: str, dtype: str, plain: bool = True) -> Case:
    """The case of one op.

    Args:
        op: "features", "received", "bam", "select", "compact" or "step".
        num_keys: N, live rows per segment.
        shape_name: key of SHAPES.
        dtype: key of DTYPES.
        plain: whether to offer the plain expression; it needs N^2 memory.
    """
    layer = Layer(num_keys, SHAPES[shape_name], dtype)
    s = layer.shape
    ours: Callable[[], Any]
    check: Callable[[], None]
    plain_fn: Callable[[], Any] | None = None
    floor: Callable[[], Any] | None = None
    floor_name = ""
    if op in ("features", "step", "received"):
        q = layer.q.float().reshape(layer.segments, -1, s.head_dim)
        k = layer.k.float().view(layer.segments, num_keys, s.head_dim)
        out = torch.empty(q.shape[1], num_keys)

        def matmul() -> None:
            for i in range(layer.segments):
                torch.mm(q[i], k[i].T, out=out)

        floor, floor_name = matmul, "fp32 mm(Q, K^T)"
    if op == "features":
        ours, plain_fn = layer.spectrogram, layer.plain_spectrogram
        check = lambda: _check_features(layer)  # noqa: E731
    elif op == "received":
        ours, check = layer.received, lambda: _check_features(layer)
    elif op == "bam":
        exps = torch.randn(min(num_keys * num_keys // 2, 2**20))
        turns = max(1, layer.segments * num_keys * num_keys // 2 // exps.numel())

        def exponentials() -> None:
            for _ in range(turns):
                torch.exp(exps)

        ours, plain_fn = layer.bam, lambda: layer.plain_bam(layer.state)
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
            ours = lambda: layer.compact(layer.state, keep, num_kept)  # noqa: E731
            plain_fn = lambda: layer.plain_compact(layer.state, rows)  # noqa: E731
            source = torch.zeros(rows.numel() * 2 * s.head_dim, dtype=layer.k.dtype)
            floor, floor_name = source.clone, "copy of kept K, V"
    elif op == "step":
        ours, plain_fn = layer.step, layer.plain_step

        def check() -> None:
            _check_features(layer)
            _check_scores(layer)
            _check_compact(layer)
    else:
        raise ValueError(f"op must be one of features, received, bam, select, compact, step: {op}")
    name = f"{op}-{shape_name}-N{num_keys}-{dtype}"
    return Case(name, ours, plain_fn if plain else None, floor, check, floor_name)


def interleaved(case: Case, rounds: int) -> dict[str, float]:
    """Least CPU seconds of each of the three, taken in turns; the plain one at most 3 times."""
    best: dict[str, float] = {}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for i in range(rounds):
        for what in ("ours", "plain", "floor"):
            run = getattr(case, what)
            if run is None or (what == "plain" and i >= 3):
                continue
            start = clock()
            run()
            best[what] = min(best.get(what, math.inf), clock() - start)
    return best
