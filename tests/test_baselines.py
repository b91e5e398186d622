"""Every baseline against brute force: a dense cache, saved probabilities, sorting in Python."""

from __future__ import annotations

import pytest
import torch
from hf_models import (
    FAMILIES,
    DenseOracle,
    build,
    oracle_logits,
    positions,
    select_by,
    tokens,
)
from namm_ext import Budget, NAMMCache
from namm_ext.baselines import (
    H2O,
    TOVA,
    Full,
    KeyDiff,
    KNorm,
    NeverEvict,
    Random,
    SnapKV,
    StreamingLLM,
)

LENGTH = 75


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


# What each rule ranks by, on the oracle's dense history; dead tokens are masked by the selection.


def by_position(oracle, layer, index, t):
    return torch.arange(layer.alive.shape[1]).expand_as(layer.alive)


def by_accumulated_attention(oracle, layer, index, t):
    return layer.probs.sum(dim=1)


def by_last_attention(oracle, layer, index, t):
    return layer.probs[:, t - 1]


def by_last_attention_of_the_layer(oracle, layer, index, t):
    return layer.probs[:, t - 1].mean(dim=0).expand_as(layer.alive)


def by_norm(oracle, layer, index, t):
    return -layer.keys.square().sum(-1).sqrt()


def by_key_difference(oracle, layer, index, t):
    scores = torch.zeros(layer.alive.shape, dtype=torch.float64)
    for h, alive in enumerate(layer.alive):
        rows = alive.nonzero().flatten()
        unit = torch.nn.functional.normalize(layer.keys[h, rows], dim=-1)
        scores[h, rows] = -torch.cosine_similarity(layer.keys[h, rows], unit.mean(0)[None], dim=-1)
    return scores


def by_pooled_window(window, kernel):
    def score(oracle, layer, index, t):
        scores = torch.zeros(layer.alive.shape, dtype=torch.float64)
        for h, alive in enumerate(layer.alive):
            rows = alive.nonzero().flatten()
            rows = rows[rows < t - window]
            if rows.numel():
                seen = layer.probs[h, t - window : t][:, rows].sum(0)
                pooled = torch.nn.functional.avg_pool1d(
                    seen[None], kernel, stride=1, padding=kernel // 2
                )
                scores[h, rows] = pooled[0]
        return scores

    return score


CASES = {
    "StreamingLLM": (StreamingLLM(12, 16), by_position, {"sink_tokens": 4}),
    "H2O": (H2O(12, 16), by_accumulated_attention, {"recent_tokens": 6}),
    "H2O_layer": (H2O(Budget(12, scope="per_layer", recent_tokens=3), 16),
                  by_accumulated_attention, {"recent_tokens": 3}),
    "H2O_every_token": (H2O(12, 1), by_accumulated_attention, {"recent_tokens": 6}),
    "SnapKV": (SnapKV(14, 16, window=5), by_pooled_window(5, 5), {"recent_tokens": 5}),
    "SnapKV_layer": (
        SnapKV(Budget(14, scope="per_layer", sink_tokens=1), 16, window=6, kernel_size=3),
        by_pooled_window(6, 3), {"recent_tokens": 6, "sink_tokens": 1}),
    "SnapKV_wide_window": (SnapKV(30, 16, window=24, kernel_size=1), by_pooled_window(24, 1),
                           {"recent_tokens": 24}),
    "TOVA": (TOVA(12, 16), by_last_attention_of_the_layer, {}),
    "TOVA_every_token": (TOVA(12, 1), by_last_attention_of_the_layer, {}),
    "TOVA_head": (TOVA(12, 16, heads="head"), by_last_attention, {}),
    "TOVA_layer_budget": (TOVA(Budget(12, scope="per_layer"), 16), by_last_attention, {}),
    "KNorm": (KNorm(12, 16), by_norm, {}),
    "KNorm_layer": (KNorm(Budget(12, scope="per_layer", sink_tokens=2, recent_tokens=3), 16),
                    by_norm, {"sink_tokens": 2, "recent_tokens": 3}),
    "KeyDiff": (KeyDiff(12, 16), by_key_difference, {}),
    "KeyDiff_layer": (KeyDiff(Budget(12, scope="per_layer"), 16), by_key_difference, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_brute_force(model, name):
    policy, score, floors = CASES[name]
    oracle = DenseOracle(
        policy.n_up, score, select_by(None, policy.budget.size, policy.budget.scope, **floors)
    )
    ids = tokens(1, LENGTH)
    want = oracle_logits(model, oracle, ids)
    cache = NAMMCache(model, policy)
    got = torch.cat(
        [model(part, past_key_values=cache).logits for part in ids.split((41, 1, 33), dim=1)], 1
    )
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    for layer in cache.layers:
        assert positions(layer) == oracle.kept_positions(layer.layer_idx)
        assert sum(layer.kv.store.kept) == 2 * policy.budget.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_kernels_agree_with_float64(model, name, dtype):
    """Through the compiled ops; near ties may fall otherwise, and more of them in bfloat16."""
    policy = CASES[name][0]
    ids = tokens(2, LENGTH)
    exact = NAMMCache(model, policy)
    model(ids, past_key_values=exact)
    other = build(FAMILIES["llama"](), dtype)
    cache = NAMMCache(other, policy)
    other(ids, past_key_values=cache)
    layer, truth = cache.layers[0], exact.layers[0]
    assert layer.kv.store.segments.k.dtype == dtype
    for row in (0, 1):
        pairs = list(zip(positions(layer, row), positions(truth, row), strict=True))
        assert sum(len(a) for a, _ in pairs) == sum(len(b) for _, b in pairs)
        common = sum(len(set(a) & set(b)) for a, b in pairs)
        share = 0.98 if dtype == torch.float32 else 0.7
        assert common >= share * sum(len(b) for _, b in pairs)


@torch.no_grad()
def test_random_is_a_stable_uniform_sample(model):
    ids = tokens(2, 600)
    policy = Random(150, 50, seed=7)
    cache, other = NAMMCache(model, policy), NAMMCache(model, Random(150, 50, seed=8))
    model(ids, past_key_values=cache)
    model(ids, past_key_values=other)
    samples = [positions(layer, row)[h] for layer in cache.layers for row in (0, 1) for h in (0, 1)]
    for sample in samples:
        assert len(sample) == 150
        assert 220 < sum(sample) / len(sample) < 380  # mean 300, standard deviation 14
    assert samples[0] == samples[2]  # rows alike
    assert samples[0] != samples[1]  # heads differ
    assert samples[0] != samples[4]  # layers differ
    assert samples[0] != positions(other.layers[0])[0]  # seeds differ
    # A sample of a sample: the survivors are the best priorities of the whole sequence.
    alone = NAMMCache(model, Random(150, 600, seed=7))
    model(ids[:1], past_key_values=alone)
    early = set(positions(alone.layers[0])[0]) - {599}
    assert len(early - set(samples[0])) <= 1


@torch.no_grad()
def test_never_evict(model):
    cache = NAMMCache(model, NeverEvict(n_up=16))
    model(tokens(1, LENGTH), past_key_values=cache)
    assert positions(cache.layers[0]) == [list(range(LENGTH))] * 2
    assert Full is NeverEvict


@pytest.mark.parametrize("rule", [StreamingLLM, H2O, SnapKV, TOVA, KNorm, KeyDiff, Random])
@pytest.mark.parametrize("scope", ["per_head", "per_layer"])
@torch.no_grad()
def test_budgets_hold_in_a_padded_batch(model, rule, scope):
    """Same constructor for all; padded rows equal rows alone."""
    policy = rule(Budget(10, scope=scope), n_up=16)
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache, alone = NAMMCache(model, policy), NAMMCache(model, policy)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
    model(ids[:1, 7:], past_key_values=alone)
    for layer, single in zip(cache.layers, alone.layers, strict=True):
        assert positions(layer) == positions(single)
        kept = layer.kv.store.kept
        assert [sum(kept[:2]), sum(kept[2:])] == [20, 20]
        if scope == "per_head":
            assert set(kept) == {10}


def test_fingerprints_tell_policies_apart():
    policies = [rule(c, n_up=n) for rule in (StreamingLLM, H2O, TOVA, KNorm)
                for c in (8, 9) for n in (16, 32)]  # fmt: skip
    assert len({p.fingerprint() for p in policies}) == len(policies)
    assert H2O(8, 16).fingerprint() == H2O(8, 16).fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KNorm(0), "Budget: size must be an int of at least 1"),
        (lambda: KNorm(8, n_up=0), "KNorm: n_up must be an int of at least 1, got 0"),
        (lambda: SnapKV(99, 16, window=33), r"SnapKV: window must be in \[1, 16 \+ n_up\], got 33"),
        (lambda: SnapKV(100, kernel_size=4), "SnapKV: kernel_size must be odd and positive, got 4"),
        (lambda: TOVA(8, heads="all"), "TOVA: heads must be 'layer' or 'head', got 'all'"),
    ],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
