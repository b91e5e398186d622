"""The ragged ops of the law against a dense layer that only masks what was evicted."""

from __future__ import annotations

import math
import random

import pytest
import torch
from namm_ext import reference
from namm_ext.values import Segments, Window
from reference_oracles import F64, NAN, DenseRow, RaggedLayer, Setting, close, ints, rand

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


# Bad input ----------------------------------------------------------------------------------------


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
