"""The layer that the CPU benchmarks work on: ours and the plain PyTorch expressions."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from namm_ext import ops, reference
from namm_ext.values import Segments, Window
from timing import num_copies
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
        k = torch.randn(total, s.head_dim, generator=generator).to(kind)
        v = torch.randn(total, s.head_dim, generator=generator).to(kind)
        q = torch.randn(s.batch_size, heads, rows, s.head_dim, generator=generator) * 2
        self.store = Segments(
            k=k,
            v=v,
            pos=torch.arange(num_keys, dtype=torch.int32).repeat(self.segments),
            state=torch.rand(total, reference.NUM_BINS, generator=generator) * 0.05,
            cu_seqlens_k=torch.arange(self.segments + 1, dtype=torch.int32) * num_keys,
            seqused_k=torch.full((self.segments,), num_keys, dtype=torch.int32),
        )
        self.window = Window(
            q=q.to(kind),
            lse=torch.empty(s.batch_size, heads, rows),
            pos_q=torch.full((s.batch_size,), num_keys - rows, dtype=torch.int32),
            active=torch.ones(s.batch_size, dtype=torch.bool),
        )
        self.params = torch.randn(1, reference.NUM_BAM_PARAMS, generator=generator) * 0.2
        self.param_index = torch.zeros(s.batch_size, dtype=torch.int32)
        self.mean = torch.full((reference.NUM_BINS,), 0.02)
        self.var = torch.full((reference.NUM_BINS,), 1e-3)
        for b in range(s.batch_size):
            for head in range(heads):
                logits = self._logits(b, head // s.num_groups, self.window.q[b, head].float())
                self.window.lse[b, head] = torch.logsumexp(logits, -1)

    def _keys(self, b: int, h: int) -> Tensor:
        start = (b * self.shape.num_kv_heads + h) * self.num_keys
        return self.store.k[start : start + self.num_keys]

    def _logits(self, b: int, h: int, q: Tensor) -> Tensor:
        logits = (q @ self._keys(b, h).to(q.dtype).T) * self.scale
        rows = torch.arange(self.num_keys - self.rows, self.num_keys)
        hidden = torch.arange(self.num_keys) > rows[:, None]
        return logits.masked_fill_(hidden, -math.inf)

    def copies(self) -> list[Layer]:
        """This one and as many copies as a rotation takes."""
        layers = [self]
        for _ in range(num_copies(self.store.k, self.store.v, self.store.state) - 1):
            layers.append(copy.copy(self))
            layers[-1].store = self.store.clone()
        return layers

    # -------- ours

    def spectrogram(self) -> Tensor:
        return ops.spectrogram(
            self.window, self.store, softmax_scale=self.scale, ema_coeff=EMA_COEFF
        )

    def received(self) -> Tensor:
        return ops.attention_received(
            self.window, self.store, softmax_scale=self.scale, first_row=reference.CARRY
        )

    def bam(self, op: Any = ops, state: Tensor | None = None) -> Tensor:
        store = self.store if state is None else self.store._replace(state=state)
        return op.bam_scores(
            store, self.params, self.param_index, self.mean, self.var, self.window.active,
            log_transform=False, log_eps=1e-6,
        )  # fmt: skip

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return ops.select(
            scores, self.store, self.window.active, threshold=-math.inf,
            cache_size=self.num_keys // 2, budget="per_head", fill=False, protect_newest=True,
            sink_tokens=0, recent_tokens=0,
        )  # fmt: skip

    def compact(self, state: Tensor, keep: Tensor, num_kept: Tensor) -> Segments:
        new = torch.zeros(self.segments + 1, dtype=torch.int32)
        new[1:] = torch.cumsum(num_kept + self.shape.n_up, 0)
        store = self.store._replace(state=state)
        return ops.compact(store, keep, num_kept, new, capacity=int(new[-1]))

    def step(self) -> Segments:
        state = self.spectrogram()
        return self.compact(state, *self.select(self.bam(state=state)))

    # -------- plain PyTorch

    def plain_spectrogram(self) -> Tensor:
        s, window = self.shape, reference.hann_window()
        q = self.window.q.view(s.batch_size, s.num_kv_heads, s.num_groups, self.rows, s.head_dim)
        k = self.store.k.view(s.batch_size, s.num_kv_heads, 1, self.num_keys, s.head_dim)
        if q.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # PyTorch's product of bf16 takes 18 times that of floats on such a CPU.
            q, k = q.float(), k.float()
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
        return (1 - alpha) * (frames @ weight) + alpha**count * self.store.state

    def plain_bam(self, state: Tensor) -> Tensor:
        n = self.num_keys
        features = reference.token_features(
            state[:n], self.store.pos[:n], self.mean, self.var, False, 1e-6
        )[:, : reference.NUM_RECENCY].expand(self.segments, -1, -1)
        z = reference.normalise(state, self.mean, self.var).view(self.segments, n, -1)
        return reference.bam(torch.cat([features, z], -1), self.params[0]).flatten()

    def plain_keep(self, scores: Tensor) -> Tensor:
        kept = scores.view(self.segments, -1).topk(self.num_keys // 2, dim=-1).indices
        kept = kept.sort(-1).values
        return (kept + torch.arange(self.segments)[:, None] * self.num_keys).flatten()

    def plain_compact(self, state: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(0, rows) for x in (*self.store.tokens[:3], state))

    def plain_step(self) -> tuple[Tensor, ...]:
        state = self.plain_spectrogram()
        return self.plain_compact(state, self.plain_keep(self.plain_bam(state)))
