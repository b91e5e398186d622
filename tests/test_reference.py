"""Properties and oracles for the law itself, mostly in float64, where the golden vectors end.

The oracles share no code path with what they check: attention is a dense masked softmax over
all tokens ever seen, the left context is carried as data, selection sorts Python tuples.
"""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
from namm_ext import reference
from namm_ext.values import Segments, Window
from torch import Tensor
from torch.nn import functional as F

F64 = torch.float64
NAN = float("nan")


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=F64) * scale


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_docstring_examples():
    result = doctest.testmod(reference)
    assert result.attempted > 15
    assert result.failed == 0


def test_constants_equal_the_header():
    header = Path(__file__).parents[1] / "cpp" / "include" / "namm_ext" / "params.h"
    constants: dict[str, float] = {}
    for name, text in re.findall(r"constexpr \w+ (k\w+) = ([^;]+);", header.read_text()):
        text = re.sub(r"(?<=\d)f\b", "", text).replace("/", "//")
        constants[name] = eval(text, {}, constants)
    pairs = {
        "kNFft": reference.N_FFT, "kHop": reference.HOP, "kCarry": reference.CARRY,
        "kNumBins": reference.NUM_BINS, "kNumRecency": reference.NUM_RECENCY,
        "kNumFeatures": reference.NUM_FEATURES, "kHidden": reference.HIDDEN,
        "kRecencyMaxFreq": reference.RECENCY_MAX_FREQ, "kMinStd": reference.MIN_STD,
        "kLogClamp": reference.LOG_CLAMP, "kNumBamParams": reference.NUM_BAM_PARAMS,
    }  # fmt: skip
    assert {name: constants[name] for name in pairs} == pairs
    offset = 0
    for name, shape in reference.BAM_LAYOUT:
        assert constants[f"kOffset{name.upper()}"] == offset, name
        offset += math.prod(shape)


# Spectrogram, EMA, normalisation ------------------------------------------------------------------


def test_spectrogram_is_the_windowed_fourier_sum():
    attn, tail = rand(2, 48, 5), rand(2, 5, 16)
    got = reference.spectrogram_from_attention(attn, tail)
    x = torch.cat([tail, attn.transpose(1, 2)], dim=-1)
    assert got.shape == (2, 3, 5, 17)
    assert got.dtype == F64
    for f, k in itertools.product(range(3), range(17)):
        total = torch.zeros(2, 5, dtype=torch.complex128)
        for m in range(32):
            w = 0.5 * (1 - math.cos(2 * math.pi * m / 32))
            turn = -2 * math.pi * k * m / 32
            total += w * x[..., 16 * f + m] * complex(math.cos(turn), math.sin(turn))
        close(got[:, f, :, k], total.abs())


def test_spectrogram_from_block_transforms():
    """The form the kernels use: one 16-point block per hop, Hann as a filter over bins."""
    attn, tail = rand(64, 3), rand(3, 16)
    x = torch.cat([tail, attn.T], dim=-1).unflatten(-1, (-1, 16))
    k = torch.arange(-1, 18, dtype=F64)
    turns = torch.exp(-2j * math.pi * torch.arange(16, dtype=F64)[:, None] * k / 32)
    blocks = x.to(torch.complex128) @ turns
    sign = torch.where(k % 2 == 0, 1.0, -1.0)
    rect = blocks[:, :-1] + sign * blocks[:, 1:]
    hann = rect[..., 1:-1] / 2 - rect[..., :-2] / 4 - rect[..., 2:] / 4
    close(reference.spectrogram_from_attention(attn, tail), hann.abs().transpose(0, 1))


def test_spectrogram_of_a_constant():
    got = reference.spectrogram_from_attention(
        torch.full((32, 1), 0.25, dtype=F64), torch.full((1, 16), 0.25, dtype=F64)
    )
    want = torch.zeros(17, dtype=F64)
    want[:2] = torch.tensor([4.0, 2.0])
    close(got, want.expand(2, 1, 17))


def test_periods_join_without_a_seam():
    attn = rand(96, 4)
    whole = reference.fold_ema(
        reference.spectrogram_from_attention(attn), torch.zeros(4, 17, dtype=F64), 0.97
    )
    ema, tail = torch.zeros(4, 17, dtype=F64), None
    for start, stop in ((0, 16), (16, 64), (64, 96)):
        piece = attn[start:stop]
        ema = reference.fold_ema(reference.spectrogram_from_attention(piece, tail), ema, 0.97)
        tail = attn[stop - 16 : stop].T
    close(ema, whole)


def test_fold_ema_is_the_streaming_average():
    magnitudes, ema = rand(6, 3, 17).abs(), rand(3, 17).abs()
    want = ema.clone()
    for frame in magnitudes:
        want = 0.99**16 * want + (1 - 0.99**16) * frame
    close(reference.fold_ema(magnitudes, ema, 0.99), want)


@pytest.mark.parametrize("rows", [0, 8, 40])
def test_spectrogram_refuses_other_lengths(rows):
    message = (
        f"spectrogram_from_attention: attn must have a positive multiple of 16 rows, got {rows}"
    )
    with pytest.raises(ValueError, match=message):
        reference.spectrogram_from_attention(torch.zeros(rows, 2))


def test_spectrogram_refuses_other_tails():
    with pytest.raises(ValueError, match=r"tail must be \[2, 16\], got \[2, 15\]"):
        reference.spectrogram_from_attention(torch.zeros(16, 2), torch.zeros(2, 15))


def test_merged_statistics_are_the_pooled_ones():
    parts = [rand(n, 2, 17) * 3 + 1 for n in (1, 7, 40)]
    merged = reference.batch_statistics(rand(0, 17))
    for part in parts:
        merged = reference.merge_statistics(merged, reference.batch_statistics(part))
    pooled = torch.cat(parts).reshape(-1, 17)
    close(merged.mean, pooled.mean(0))
    close(merged.var, ((pooled - pooled.mean(0)) ** 2).mean(0))
    assert int(merged.num) == 96


def test_normalise():
    ema, mean, var = rand(4, 17).abs(), rand(17), rand(17).abs()
    var[3] = 0.0
    std = [max(math.sqrt(v), 1e-7) for v in var.tolist()]
    want = [
        [(e - m) / s for e, m, s in zip(row, mean.tolist(), std, strict=True)]
        for row in ema.tolist()
    ]
    torch.testing.assert_close(reference.normalise(ema, mean, var), torch.tensor(want, dtype=F64))

    want = [
        [
            min(max((math.log(e + 1e-3) - m) / s, -20.0), 20.0)
            for e, m, s in zip(row, mean.tolist(), std, strict=True)
        ]
        for row in ema.tolist()
    ]
    got = reference.normalise(ema, mean, var, True, 1e-3)
    torch.testing.assert_close(got, torch.tensor(want, dtype=F64))
    assert (got[:, 3].abs() == 20).all()  # a bin without variance clamps instead of exploding


def test_recency_of_any_age():
    ages = torch.tensor([0, 1, 511, 32768, 2_000_000])
    got = reference.recency_embedding(ages, offset=1, dtype=F64)
    for row, age in zip(got.tolist(), ages.tolist(), strict=True):
        freqs = [50000.0 ** (-j / 4) for j in range(4)]
        want = [fn((age + 1) * f) for fn in (math.sin, math.cos) for f in freqs]
        assert row == pytest.approx(want, abs=1e-9)


# Scorers ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("num_keys", [1, 2, 33])
def test_bam(num_keys):
    x, params = rand(num_keys, 25), rand(4172, scale=0.3)
    close(reference.bam(x, params), bam_oracle(x, params))


def test_bam_looks_only_at_newer_tokens():
    x, params = rand(2, 20, 25), rand(4172, scale=0.3)
    scores = reference.bam(x, params)
    changed = x.clone()
    changed[:, 7] += 1
    moved = (reference.bam(changed, params) != scores).all(0)
    assert moved.tolist() == [i <= 7 for i in range(20)]


def test_bam_padding_is_invisible():
    x, params = rand(12, 25), rand(4172, scale=0.3)
    mask = torch.ones(12)
    mask[[2, 5]] = 0
    got = reference.bam(x, params, mask)
    alone = reference.bam(x[mask.bool()], params)
    close(got[mask.bool()], alone)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("hidden", "depth", "residual_first"), [
    (25, 1, False), (25, 2, True), (7, 2, False), (25, 4, True), (7, 4, False),
])  # fmt: skip
def test_mlp(hidden, depth, bias, residual_first):
    n = reference.num_mlp_params(hidden, depth, bias)
    x, params = rand(3, 9, 25), rand(n, scale=0.3)
    w = reference.split_params(params, reference.mlp_layout(hidden, depth, bias))
    biases = [w[f"b{i}"] if bias else torch.zeros(1, dtype=F64) for i in range(1, depth + 1)]
    h = x
    if depth > 1:
        h = F.relu(F.linear(x, w["W1"].T, None) + biases[0]) + (x if residual_first else 0)
    for _ in range(2, depth):
        h = h + F.relu(h)
    want = (F.linear(h, w[f"W{depth}"].T) + biases[-1]).squeeze(-1)
    got = reference.mlp(x, params, hidden, depth, bias, residual_first)
    close(got, want)
    if depth > 2:  # the original's dead layers: their parameters change nothing
        for name in ("W2", "W3"):
            w[name].add_(1.0)
        close(reference.mlp(x, params, hidden, depth, bias, residual_first), got)


def test_params_of_another_size_are_refused():
    with pytest.raises(ValueError, match="params must have 4172 numbers, got 4171"):
        reference.bam(torch.zeros(1, 25), torch.zeros(4171))


# The ragged ops against a dense layer that only masks what was evicted ---------------------------


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


SETTINGS = {
    "ragged": Setting(),
    "reference-mode": Setting(select={"fill": True}),
    "reference-mode-capped": Setting(select={"fill": True, "cache_size": 20}),
    "per-head-budget": Setting(select={"threshold": -math.inf, "cache_size": 11}),
    "per-layer-budget": Setting(
        select={"threshold": -math.inf, "cache_size": 9, "budget": "per_layer"}, num_heads=3
    ),
    "budget-and-threshold": Setting(
        select={"cache_size": 17, "budget": "per_layer", "threshold": 0.5}
    ),
    "floors": Setting(select={"sink_tokens": 3, "recent_tokens": 9, "threshold": 1.0}),
    "topk-unprotected": Setting(
        select={"threshold": -math.inf, "cache_size": 6, "protect_newest": False}
    ),
    "log-mlp": Setting(
        select={"threshold": -math.inf, "cache_size": 13},
        log=True,
        scorer="mlp",
        num_rows=1,
        groups=1,
    ),
    "one-head-n16": Setting(num_heads=1, groups=4, n_up=16, num_rows=3, total=100),
}


@pytest.mark.parametrize("poison", [True, False], ids=["poisoned", "clean"])
@pytest.mark.parametrize("name", SETTINGS)
def test_ragged_layer_equals_dense_layer(name, poison):
    """Outputs, states, scores and kept tokens, over several evictions, rows out of step."""
    s = SETTINGS[name]
    num_params = 4172 if s.scorer == "bam" else 25
    num_q = s.num_heads * s.groups
    q = rand(s.num_rows, num_q, s.total, s.head_dim)
    k, v = (rand(s.num_rows, s.num_heads, s.total, s.head_dim) for _ in range(2))
    params = rand(3, num_params, scale=0.3)
    index = ints(*(b % 3 for b in range(s.num_rows)))
    mean, var = rand(17).abs(), rand(17).abs() + 0.1
    layer = RaggedLayer(s, poison)
    dense = [DenseRow(s, q[b], k[b], v[b], params[index[b]]) for b in range(s.num_rows)]

    rng = random.Random(1)
    updates = evicted = 0
    while min(layer.seen) < s.total:
        limits = [
            min(s.n_up - clock, s.total - seen)
            for clock, seen in zip(layer.clock, layer.seen, strict=True)
        ]
        num_new = [rng.randint(0, limit) for limit in limits]
        if not any(num_new):
            num_new = limits
        first = [rng.randint(0, 3) for _ in num_new]
        width = max(a + n for a, n in zip(first, num_new, strict=True)) + 1
        junk = NAN if poison else 0.0
        call = [
            torch.full((s.num_rows, x.shape[1], width, s.head_dim), junk, dtype=F64)
            for x in (q, k, v)
        ]
        for b, (a, n) in enumerate(zip(first, num_new, strict=True)):
            for target, source in zip(call, (q, k, v), strict=True):
                target[b, :, a : a + n] = source[b, :, layer.seen[b] : layer.seen[b] + n]
        out = layer.feed(*call, first, num_new)
        for b, (a, n) in enumerate(zip(first, num_new, strict=True)):
            want = [dense[b].step() for _ in range(n)]
            if want:
                close(out[b, a : a + n], torch.stack(want))
            assert not out[b, a + n :].any()
            assert not out[b, :a].any()
        for b in layer.update(params, index, mean, var):
            updates += 1
            before = dense[b].t
            kept = dense[b].update(mean, var)
            for h in range(s.num_heads):
                _, _, pos, state = layer.segment(b, h)
                assert pos.tolist() == kept[h], (b, h)
                close(state, dense[b].ema[h, kept[h]])
                evicted += before - len(kept[h])
    assert updates >= s.num_rows * (s.total // s.n_up)
    assert evicted > 0


def test_received_attention_is_the_column_sum():
    s = Setting(num_rows=2, total=64)
    layer = RaggedLayer(s, poison=True)
    q = rand(2, 4, 32, 8)
    k, v = rand(2, 2, 32, 8), rand(2, 2, 32, 8)
    layer.feed(q, k, v, [0, 0], [32, 20])
    window = layer.window([-16, -16], [True, False])
    for first_row in (0, 16, 30, 48):
        got = reference.attention_received(
            window, layer.store, softmax_scale=0.4, first_row=first_row
        )
        logits = torch.einsum("hgqd,hkd->hgqk", q[0].unflatten(0, (2, 2)), k[0]) * 0.4
        logits = logits.masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf)
        want = logits.softmax(-1).mean(1)[:, max(first_row - 16, 0) :].sum(1)
        close(got[:64].view(2, 32), want)
        assert not got[64:].any()
    with pytest.raises(ValueError, match=r"first_row must be in \[0, 48\], got 49"):
        reference.attention_received(window, layer.store, softmax_scale=0.4, first_row=49)


def test_inactive_rows_stay_as_they_are():
    s = Setting(num_rows=2)
    layer = RaggedLayer(s, poison=True)
    layer.feed(rand(2, 4, 32, 8), rand(2, 2, 32, 8), rand(2, 2, 32, 8), [0, 0], [32, 32])
    for b in range(2):
        layer.segment(b, 0)[3].normal_()
    store, window = layer.store, layer.window([-16, -16], [False, True])
    new = reference.spectrogram(window, store, softmax_scale=0.4, ema_coeff=0.99)
    assert torch.equal(new[:64], store.state[:64])
    assert not torch.equal(new[64:], store.state[64:])
    scores = reference.bam_scores(
        store, rand(1, 4172), ints(0, 0), rand(17), rand(17).abs(), window.active,
        log_transform=False, log_eps=1.0,
    )  # fmt: skip
    assert not scores[:64].any()
    assert scores[64:].all()
    scores[:64] = NAN
    keep, num_kept = reference.select(
        scores, store, window.active, **{**s.select_args, "cache_size": 3}
    )
    assert keep[:64].all()
    assert num_kept.tolist()[:2] == [32, 32]
    assert max(num_kept[2:]) <= 3


def test_attend_sees_nothing_before_the_first_key():
    out, lse = torch.full((1, 3, 1, 2), 5.0), torch.full((1, 1, 3), 5.0)
    k, v = torch.ones(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    store = Segments(k, v, ints(1, 9), torch.zeros(2, 0), ints(0, 2), ints(2))
    reference.attend_(
        out, lse, torch.ones(1, 1, 3, 2), store, ints(1), ints(2), ints(0), softmax_scale=1.0
    )
    assert out[0, :, 0].tolist() == [[5.0, 5.0], [0.0, 0.0], [1.0, 2.0]]
    assert lse[0, 0].tolist() == [5.0, -math.inf, 2.0]


def test_original_roundings():
    """round_to repeats the original: bf16 logits, fp32 softmax, bf16 probabilities and mean."""
    bf16 = torch.bfloat16
    num_rows, groups = 32, 2
    q, k, v = (torch.randn(h, num_rows, 16).to(bf16) for h in (groups, 1, 1))
    scale = 16**-0.5
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    logits = logits.float().masked_fill(torch.ones(num_rows, num_rows).triu(1).bool(), -torch.inf)
    probs = logits.softmax(-1).to(bf16)
    mean = probs.float().mean(0).to(bf16).float()
    want = reference.fold_ema(
        reference.spectrogram_from_attention(mean), torch.zeros(num_rows, 17), 0.99
    )
    pos = torch.arange(num_rows, dtype=torch.int32)
    state = torch.zeros(num_rows, 17)
    store = Segments(k[0], v[0], pos, state, ints(0, num_rows), ints(num_rows))
    out, lse = reference.attend(
        q[None], store, ints(0), ints(num_rows), ints(0), softmax_scale=scale, round_to=bf16
    )
    torch.testing.assert_close(out[0].transpose(0, 1), probs @ v, rtol=2**-7, atol=2**-7)
    window = Window(
        torch.cat([torch.zeros(1, groups, 16, 16, dtype=bf16), q[None]], dim=2),
        torch.cat([torch.zeros(1, groups, 16), lse], dim=2),
        ints(-16),
        torch.tensor([True]),
    )

    def ema(round_to):
        return reference.spectrogram(
            window, store, softmax_scale=scale, ema_coeff=0.99, round_to=round_to
        )

    rounded, exact = (ema(bf16) - want).abs().max(), (ema(None) - want).abs().max()
    # A probability on the edge between two bf16 values may still fall to the other side.
    assert rounded < exact / 4, (rounded, exact)


# Selection ----------------------------------------------------------------------------------------


def run_select(scores: list[list[float]], pos=None, num_rows: int = 1, room: int = 2, **args):
    """Select on lists of segments with poisoned room behind each; returns flags and counts."""
    pos = pos or [list(range(len(row))) for row in scores]
    flat_scores: list[float] = []
    flat_pos: list[int] = []
    for row, positions in zip(scores, pos, strict=True):
        flat_scores += [*row, *[NAN] * room]
        flat_pos += [*positions, *[-(10**6)] * room]
    cu = RaggedLayer.slots([len(row) + room for row in scores])
    k = torch.zeros(len(flat_pos), 0)
    store = Segments(k, k, ints(*flat_pos), k, cu, ints(*(len(row) for row in scores)))
    keep, num_kept = reference.select(
        torch.tensor(flat_scores, dtype=F64), store, torch.ones(num_rows, dtype=torch.bool),
        **{**Setting().select_args, **args},
    )  # fmt: skip
    flags = [[bool(f) for f in keep[rows]] for rows in store.slices()]
    return flags, num_kept.tolist()


def select_cases():
    for budget, fill in (("per_head", False), ("per_head", True), ("per_layer", False)):
        for threshold, cache_size in itertools.product((-math.inf, 0.0, 5.0), (-1, 1, 4, 100)):
            yield {
                "budget": budget, "fill": fill, "threshold": threshold, "cache_size": cache_size
            }  # fmt: skip


@pytest.mark.parametrize(
    "args", list(select_cases()),
    ids=lambda a: "-".join(["fill" if a["fill"] else "ragged", a["budget"],
                            f"tau{a['threshold']}", f"C{a['cache_size']}"]),
)  # fmt: skip
def test_select_equals_sorted_tuples(args):
    rng = random.Random(7)
    for trial in range(40):
        num_rows, num_heads = rng.choice([(1, 1), (1, 3), (2, 2)])
        floors = {
            "protect_newest": rng.random() < 0.7,
            "sink_tokens": rng.choice([0, 0, 2]),
            "recent_tokens": rng.choice([0, 0, 3]),
        }
        scores, pos = [], []
        for _ in range(num_rows * num_heads):
            n = rng.choice([0, 1, 2, 9, 14])
            scores.append([float(rng.choice([-2, -1, -0.0, 0.0, 1, 2])) for _ in range(n)])
            pos.append(sorted(rng.sample(range(30), n)))
        flags, num_kept = run_select(scores, pos, num_rows, **args, **floors)
        for b in range(num_rows):
            heads = slice(b * num_heads, (b + 1) * num_heads)
            want = select_oracle(
                [[x + 0.0 for x in row] for row in scores[heads]], pos[heads], **args, **floors
            )
            assert flags[heads] == want, (trial, scores, pos, floors)
            assert num_kept[heads] == [sum(f) for f in want]


def test_zero_of_either_sign_is_kept_and_ties_go_to_the_newer():
    flags, _ = run_select([[-0.0, 0.0, -1e-30, -5.0]])
    assert flags == [[True, True, False, True]]
    flags, _ = run_select([[0.0, -0.0, 0.0, -0.0]], cache_size=2, protect_newest=False)
    assert flags == [[False, False, True, True]]


def test_zero_scores_under_a_budget_are_a_recency_window():
    flags, num_kept = run_select(
        [[0.0] * 6, [0.0] * 6], pos=[[0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8, 10]],
        cache_size=3, budget="per_layer",
    )  # fmt: skip
    # Shared by the heads: the newest six positions of both, then the lower head.
    assert flags == [[False] * 4 + [True] * 2, [False, False, True, True, True, True]]
    assert num_kept == [2, 4]


def test_newest_survives_any_score_in_each_head():
    low, high = [-9.0] * 5, [1.0] * 5
    for args in ({"threshold": 0.0}, {"cache_size": 1, "budget": "per_layer"}):
        flags, _ = run_select([low, high], **args)
        assert flags[0] == [False] * 4 + [True]
        assert flags[1][-1]


def test_fill_lifts_every_head_to_the_fullest():
    flags, num_kept = run_select([[-5.0, -1.0, -3.0, -9.0], [1.0, 1.0, -1.0, -1.0]], fill=True)
    assert flags == [[False, True, True, True], [True, True, False, True]]
    assert num_kept == [3, 3]


def test_fill_never_couples_batch_rows():
    _, num_kept = run_select([[1.0] * 4, [-1.0] * 4], num_rows=2, fill=True)
    assert num_kept == [4, 1]


@pytest.mark.parametrize(("fill", "budget"), [
    (False, "per_head"), (True, "per_head"), (False, "per_layer"),
])  # fmt: skip
def test_nan_is_reported_in_its_segment(fill, budget):
    scores = [[1.0, NAN, 1.0], [1.0, -1.0, 1.0], [1.0], [1.0]]
    _, num_kept = run_select(scores, num_rows=2, fill=fill, budget=budget, cache_size=2)
    assert num_kept[0] == -1
    assert num_kept[1] == 2
    assert num_kept[2:] == [1, 1]


def test_infinite_scores_are_scores():
    flags, _ = run_select([[math.inf, -math.inf, 0.0, -1.0]], cache_size=2)
    assert flags == [[True, False, False, True]]


# Bad input ----------------------------------------------------------------------------------------


def test_select_refuses_contradictions():
    with pytest.raises(ValueError, match="budget must be 'per_head' or 'per_layer', got 'global'"):
        run_select([[1.0]], budget="global")
    with pytest.raises(ValueError, match="fill must be False with budget 'per_layer', got True"):
        run_select([[1.0]], budget="per_layer", fill=True)


def test_append_refuses_to_overflow_a_slot():
    layer = RaggedLayer(Setting(num_rows=1, num_heads=1), poison=False)
    new = torch.zeros(1, 1, 40, 8, dtype=F64)
    with pytest.raises(ValueError, match="append_: segment 0 must have room for 33 rows, got 32"):
        reference.append_(layer.store, new, new, ints(0), ints(33), ints(0))


@pytest.mark.parametrize(("op", "extra"), [
    (reference.bam_scores, {}),
    (reference.mlp_scores, {"hidden": 25, "depth": 1, "bias": False, "residual_first": False}),
])  # fmt: skip
@pytest.mark.parametrize("index", [-1, 2])
def test_scores_refuse_an_index_outside_the_bank(op, extra, index):
    params = torch.zeros(2, 25 if extra else 4172)
    k = torch.zeros(1, 0)
    store = Segments(k, k, ints(0), torch.zeros(1, 17), ints(0, 1), ints(1))
    message = rf"{op.__name__}: param_index must be in \[0, 2\), got {index}"
    with pytest.raises(ValueError, match=message):
        op(
            store, params, ints(index), torch.zeros(17), torch.ones(17), torch.tensor([True]),
            log_transform=False, log_eps=1e-6, **extra,
        )  # fmt: skip


def test_compact_refuses_disagreement():
    k = torch.zeros(2, 4)
    store = Segments(k, k, ints(0, 1), torch.zeros(2, 17), ints(0, 2), ints(2))
    keep = torch.tensor([1, 1], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"compact: num_kept\[0\] must be 2, got 1"):
        reference.compact(store, keep, ints(1), ints(0, 2), capacity=2)
    with pytest.raises(ValueError, match="compact: slot 0 must hold 2 rows, got 1"):
        reference.compact(store, keep, ints(2), ints(0, 1), capacity=1)
