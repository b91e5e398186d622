"""Oracles of the law, in float64, and the small helpers of its tests.

They share no code path with what they check: attention is a dense masked softmax over all tokens
ever seen, the left context is carried as data, selection sorts Python tuples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from namm_ext import reference
from namm_ext.values import Segments, Window
from torch import Tensor

F64 = torch.float64
NAN = float("nan")


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=F64) * scale


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def bam_oracle(x: Tensor, params: Tensor) -> Tensor:
    """Token by token, straight from the offsets of params.h."""
    w1, b1 = params[:2400].view(25, 96), params[2400:2496]
    w2, b2 = params[2496:4096].view(32, 50), params[4096:4146]
    w3, b3 = params[4146:4171], params[4171]
    qkv = x @ w1 + b1
    scores = []
    for i in range(x.shape[0]):
        logits = qkv[i:, 32:64] @ qkv[i, :32] / math.sqrt(32)
        y = (torch.softmax(logits, 0) @ qkv[i:, 64:]) @ w2 + b2
        scores.append((x[i] * (1 + y[25:]) + y[:25]) @ w3 + b3)
    return torch.stack(scores) if scores else x.new_zeros(0)


@dataclasses.dataclass
class Setting:
    num_rows: int = 2
    num_heads: int = 2
    groups: int = 2
    head_dim: int = 8
    n_up: int = 32
    total: int = 150
    scorer: str = "bam"
    log: bool = False
    select: dict = dataclasses.field(default_factory=dict)

    @property
    def select_args(self) -> dict:
        return {
            "threshold": 0.0, "cache_size": -1, "budget": "per_head", "fill": False,
            "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0, **self.select,
        }  # fmt: skip


class DenseRow:
    """One batch row with all its heads: full attention matrix, evicted keys masked out."""

    def __init__(self, s: Setting, q: Tensor, k: Tensor, v: Tensor, params: Tensor):
        self.s, self.q, self.k, self.v, self.params = s, q, k, v, params
        self.t = 0
        self.alive = [[] for _ in range(s.num_heads)]
        self.rows: list[list[Tensor]] = [[] for _ in range(s.num_heads)]
        self.ema = torch.zeros(s.num_heads, s.total, 17, dtype=F64)
        self.tail = torch.zeros(s.num_heads, s.total, 16, dtype=F64)

    def step(self) -> Tensor:
        """Attention output of the next token, ``[Hq, Dv]``."""
        t, s = self.t, self.s
        outs = []
        for h in range(s.num_heads):
            self.alive[h].append(t)
            probs = torch.zeros(s.groups, s.total, dtype=F64)
            for g in range(s.groups):
                logits = self.k[h, self.alive[h]] @ self.q[h * s.groups + g, t] * 0.4
                probs[g, self.alive[h]] = torch.softmax(logits, 0)
                outs.append(probs[g] @ self.v[h])
            self.rows[h].append(probs.mean(0))
        self.t += 1
        return torch.stack(outs)

    def update(self, mean: Tensor, var: Tensor) -> list[list[int]]:
        """Score, select, evict; returns positions kept per head."""
        s, scores = self.s, []
        for h in range(s.num_heads):
            attn = torch.stack(self.rows[h])[:, self.alive[h]]
            mags = reference.spectrogram_from_attention(attn, self.tail[h, self.alive[h]])
            ema = self.ema[h, self.alive[h]]
            for frame in mags:
                ema = 0.99**16 * ema + (1 - 0.99**16) * frame
            self.ema[h, self.alive[h]] = ema
            self.tail[h] = 0
            self.tail[h, self.alive[h]] = attn[-16:].T
            z = (ema.add(1e-3).log() if s.log else ema) - mean
            z = z / var.sqrt()
            z = z.clamp(-20, 20) if s.log else z
            ages = self.t - 1 - torch.tensor(self.alive[h])
            angles = ages[:, None] * torch.tensor([50000.0 ** (-j / 4) for j in range(4)]).to(F64)
            x = torch.cat([angles.sin(), angles.cos(), z], -1)
            scores.append(bam_oracle(x, self.params) if s.scorer == "bam" else x @ self.params)
            self.rows[h] = []
        kept = select_oracle([x.tolist() for x in scores], self.alive, **s.select_args)
        self.alive = [
            [p for p, k in zip(a, f, strict=True) if k]
            for a, f in zip(self.alive, kept, strict=True)
        ]
        return self.alive


def select_oracle(scores, pos, *, threshold, cache_size, budget, fill, protect_newest,
                  sink_tokens, recent_tokens):  # fmt: skip
    """SelectParams read aloud, on lists: one list of scores and positions per head of a row."""
    tokens = []
    for h, (row, positions) in enumerate(zip(scores, pos, strict=True)):
        for i, (score, p) in enumerate(zip(row, positions, strict=True)):
            newest = protect_newest and i == len(row) - 1
            forced = newest or p < sink_tokens or positions[-1] - p < recent_tokens
            tokens.append(
                {"key": (not newest, not forced, -score, -p, h), "id": (h, i),
                 "ok": forced or score >= threshold}
            )  # fmt: skip
    ranked = sorted(tokens, key=lambda t: t["key"])
    chosen = [t["id"] for t in ranked if t["ok"]]
    if budget == "per_layer" and cache_size >= 0:
        chosen = chosen[: cache_size * len(scores)]
    else:
        per_head = [[i for i in chosen if i[0] == h] for h in range(len(scores))]
        if cache_size >= 0:
            per_head = [ids[:cache_size] for ids in per_head]
        if fill:
            most = max(len(ids) for ids in per_head)
            everyone = [t["id"] for t in ranked]
            per_head = [[i for i in everyone if i[0] == h][:most] for h in range(len(scores))]
        chosen = [i for ids in per_head for i in ids]
    return [[(h, i) in chosen for i in range(len(row))] for h, row in enumerate(scores)]


class RaggedLayer:
    """The layer as the drop-in runs it: a store with room, windows, per-row clocks."""

    def __init__(self, s: Setting, poison: bool):
        self.s, self.poison = s, poison
        num_segments = s.num_rows * s.num_heads
        used = torch.zeros(num_segments, dtype=torch.int32)
        self.store = self.fresh(self.slots([s.n_up] * num_segments), used)
        num_q = s.num_heads * s.groups
        self.q_window = torch.zeros(s.num_rows, num_q, 16 + s.n_up, s.head_dim, dtype=F64)
        self.lse_window = torch.zeros(s.num_rows, num_q, 16 + s.n_up, dtype=F64)
        self.seen = [0] * s.num_rows
        self.clock = [0] * s.num_rows

    @staticmethod
    def slots(lengths) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    def fresh(self, cu: Tensor, used: Tensor) -> Segments:
        """A new store; unused rows hold values that would be noticed."""
        junk = NAN if self.poison else 0.0
        capacity, d = int(cu[-1]), self.s.head_dim
        return Segments(
            torch.full((capacity, d), junk, dtype=F64), torch.full((capacity, d), junk, dtype=F64),
            torch.full((capacity,), -7, dtype=torch.int32),
            torch.full((capacity, 17), junk, dtype=F64), cu, used,
        )  # fmt: skip

    def window(self, pos_q: list[int], active: list[bool]) -> Window:
        return Window(self.q_window, self.lse_window, ints(*pos_q), torch.tensor(active))

    def feed(self, q, k, v, first, num_new) -> Tensor:
        """Columns [first, first + num_new) of each row; attention output [B, L, Hq, Dv]."""
        args = (ints(*first), ints(*num_new), ints(*self.seen))
        reference.append_(self.store, k, v, *args)
        out, lse = reference.attend(q, self.store, *args, softmax_scale=0.4)
        for b, n in enumerate(num_new):
            target = slice(16 + self.clock[b], 16 + self.clock[b] + n)
            columns = slice(first[b], first[b] + n)
            self.q_window[b, :, target] = q[b, :, columns]
            self.lse_window[b, :, target] = lse[b, :, columns]
            self.seen[b] += n
            self.clock[b] += n
        return out

    def update(self, params, index, mean, var) -> list[int]:
        """Update the rows whose clock is full; returns them."""
        s = self.s
        due = [b for b in range(s.num_rows) if self.clock[b] == s.n_up]
        if not due:
            return []
        pos_q = [seen - clock - 16 for seen, clock in zip(self.seen, self.clock, strict=True)]
        window = self.window(pos_q, [b in due for b in range(s.num_rows)])
        before = self.store.state.clone()
        state = reference.spectrogram(window, self.store, softmax_scale=0.4, ema_coeff=0.99)
        torch.testing.assert_close(before, self.store.state, rtol=0, atol=0, equal_nan=True)
        store = self.store._replace(state=state)
        args = (store, params, index, mean, var, window.active)
        options = {"log_transform": s.log, "log_eps": 1e-3}
        if s.scorer == "bam":
            scores = reference.bam_scores(*args, **options)
        else:
            scores = reference.mlp_scores(
                *args, **options, hidden=25, depth=1, bias=False, residual_first=False
            )
        keep, num_kept = reference.select(scores, store, window.active, **s.select_args)
        room = [s.n_up - (0 if b in due else self.clock[b]) for b in range(s.num_rows)]
        lengths = [int(n) + room[i // s.num_heads] for i, n in enumerate(num_kept)]
        cu_new = self.slots(lengths)
        packed = reference.compact(store, keep, num_kept, cu_new, capacity=int(cu_new[-1]))
        self.store = self.fresh(cu_new, num_kept)
        for rows in packed.slices():
            for target, source in zip(self.store.tokens, packed.tokens, strict=True):
                target[rows] = source[rows]
        for b in due:
            self.q_window[b, :, :16] = self.q_window[b, :, -16:].clone()
            self.lse_window[b, :, :16] = self.lse_window[b, :, -16:].clone()
            self.clock[b] = 0
        return due

    def segment(self, b: int, h: int) -> tuple[Tensor, ...]:
        i = b * self.s.num_heads + h
        rows = self.store.slices()[i]
        return tuple(x[rows] for x in self.store.tokens)
