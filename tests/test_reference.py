"""Properties and oracles for the law itself, mostly in float64, where the golden vectors end."""

from __future__ import annotations

import doctest
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from namm_ext import reference
from reference_oracles import F64, bam_oracle, close, rand
from torch.nn import functional as F


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
