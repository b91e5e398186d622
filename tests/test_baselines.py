"""Every baseline against brute force: a dense cache, saved probabilities, sorting in Python."""

from __future__ import annotations

import doctest
from types import SimpleNamespace

import pytest
import torch
import transformers
from baseline_scores import (
    by_accumulated_attention,
    by_expected_attention,
    by_key_difference,
    by_lag,
    by_last_attention,
    by_last_attention_of_the_layer,
    by_nested_difference,
    by_norm,
    by_pooled_window,
    by_position,
)
from hf_models import (
    COMMON,
    FAMILIES,
    DenseOracle,
    build,
    gemma3_config,
    oracle_logits,
    positions,
    select_by,
    tokens,
)
from namm_ext import Budget, Calibration, NAMMCache, rotation
from namm_ext.baselines import (
    H2O,
    TOVA,
    ExpectedAttention,
    Full,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    NestedKeyDiff,
    NeverEvict,
    Random,
    SnapKV,
    StreamingLLM,
    by_key,
    by_query,
    by_repetition,
)
from namm_ext.baselines.grid import GRID
from namm_ext.rotation import Rotation, rotation_of

LENGTH = 75


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


LLAMA = Rotation(tuple(10000.0 ** (-i / 8) for i in range(0, 8, 2)))

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
    "NestedKeyDiff": (NestedKeyDiff(20, 16, block=25, window=4), by_nested_difference(25, 4), {}),
    "NestedKeyDiff_layer": (
        NestedKeyDiff(Budget(15, scope="per_layer", sink_tokens=2), 16, block=5, window=7),
        by_nested_difference(5, 7), {"sink_tokens": 2}),
    "LagKV": (LagKV(40, 16, lag=8), by_lag(4, 8), {"sink_tokens": 4, "recent_tokens": 8}),
    "LagKV_odd": (LagKV(Budget(34, sink_tokens=3, recent_tokens=0.5), 10, lag=7), by_lag(3, 7),
                  {"sink_tokens": 3, "recent_tokens": 17}),
    "LagKV_layer": (LagKV(Budget(40, scope="per_layer", sink_tokens=1), 16, lag=9), by_lag(1, 9),
                    {"sink_tokens": 1, "recent_tokens": 9}),
    "ExpectedAttention": (ExpectedAttention(12, 16, future=50, rotation=LLAMA),
                          by_expected_attention(4, 50), {"sink_tokens": 4}),
    "ExpectedAttention_layer": (
        ExpectedAttention(
            Budget(12, scope="per_layer", sink_tokens=1, recent_tokens=2), 20, future=7,
            epsilon=0.02, rotation=LLAMA),
        by_expected_attention(1, 7, 0.02), {"sink_tokens": 1, "recent_tokens": 2}),
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


RULES = (StreamingLLM, H2O, SnapKV, TOVA, KNorm, KeyDiff, NestedKeyDiff, LagKV, ExpectedAttention,
         Random)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["per_head", "per_layer"])
@torch.no_grad()
def test_budgets_hold_in_a_padded_batch(model, rule, scope):
    """Same constructor for all; padded rows equal rows alone."""
    policy = rule(Budget(10, scope=scope), n_up=16).for_context(model, None, ())
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


@torch.no_grad()
def test_a_thinned_partition(model):
    """A budget that cannot hold what is not ranked yet: it still holds, and scores are numbers."""
    cache = NAMMCache(model, LagKV(Budget(6), 16, lag=16))
    model(tokens(1, LENGTH), past_key_values=cache)
    for layer in cache.layers:
        assert set(layer.kv.store.kept) == {6}
        assert layer.kv.store.segments.state[layer.kv.store.segments.live].isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_global_scope_follows_the_calibration(model, rule):
    scores = torch.tensor([[1.0, 0.5], [2.0, 0.1]]), torch.zeros(2, 2)
    calibration = Calibration(
        scores[1], torch.tensor([0.25, 1.0]), torch.tensor([[0.15, 1], [0.35, 1]]), scores[0]
    )
    budget = Budget(20, scope="global", sink_tokens=4, recent_tokens=0.1)
    policy = rule(budget, n_up=16).for_context(model, None, ()).with_calibration(calibration)
    cache = NAMMCache(model, policy)
    model(tokens(1, 80), past_key_values=cache)
    assert [sum(layer.kv.store.kept) for layer in cache.layers] == [24, 56]
    for layer in cache.layers:
        for held in positions(layer):
            assert {0, 1, 2, 3, 79} <= set(held)


class Words:
    """A tokenizer whose chat begins with 2 3 and goes on with 5 6 after the user."""

    chat_template, is_fast = "yes", True

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"23{message['content']}56" for message in messages)

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[ord(c) % 7 for c in text])


@pytest.fixture(scope="module")
def weights(model):
    """What KVzip ranks by, from the probabilities of an eager second reading: [L, H, T]."""
    opening, ask = (
        Words()(text, add_special_tokens=False).input_ids
        for text in ("23", "\n\nRepeat the previous context exactly.56")
    )
    context = torch.cat([torch.tensor([opening]), tokens(1, LENGTH, seed=5)], 1)
    ids = torch.cat([context, torch.tensor([ask]), context[:, len(opening) :]], 1)
    eager = build(FAMILIES["llama"](), torch.float64)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = eager(ids, output_attentions=True).attentions
    n = context.shape[1]
    dense = [p[0, :, n:, :n].unflatten(0, (2, 2)).amax((1, 2)) for p in found]
    return context, torch.stack(dense)


def test_kvzip_reads_twice(model, weights):
    context, dense = weights
    policy = KVzip(0.25).for_context(model, Words(), context[0].tolist())
    assert policy.two_passes
    assert not KNorm(9).two_passes
    assert policy.n_up == context.shape[1]
    # The eager softmax is in float32.
    found = torch.stack(list(policy.weights.values()))
    torch.testing.assert_close(found, dense, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"sink_tokens": 0}, {"scope": "per_layer", "recent_tokens": 0.25}, {"scope": "per_head"},
    {"recent_tokens": 9, "size": 19},
], ids=repr)  # fmt: skip
@torch.no_grad()
def test_kvzip_keeps_the_best_once(model, weights, changes):
    context, dense = weights
    n = context.shape[1]
    policy = KVzip(0.25).with_budget(**changes).with_weights(dict(enumerate(dense)))
    cache = NAMMCache(model, policy)
    for part in (context[:, :31], context[:, 31:], tokens(1, 2 * n, seed=6)):
        model(part, past_key_values=cache)
    got = [[p for p in held if p < n] for layer in cache.layers for held in positions(layer)]
    # What came later is all there.
    assert all(set(range(n, 3 * n)) <= set(positions(layer)[0]) for layer in cache.layers)

    budget = policy.budget
    tokens_each = int(budget.size * n) if isinstance(budget.size, float) else budget.size
    ranked = dense.clone()
    if budget.scope == "global":
        sinks, recent = budget.floors(tokens_each)
        ranked[..., :sinks] = ranked[..., n - max(recent, 1) :] = 9.0
        order = ranked.flatten().sort(descending=True).indices[: tokens_each * 4]
        counts = [int((order // (2 * n) == layer).sum()) // 2 for layer in (0, 1)]
        assert sum(counts) in (2 * tokens_each - 1, 2 * tokens_each)
        assert counts[0] != counts[1]
    else:
        counts = [tokens_each] * 2
    for layer, count in enumerate(counts):
        sinks, recent = budget.floors(count)
        ranked[layer][:, :sinks] = ranked[layer][:, n - max(recent, 1) :] = 9.0
        if budget.scope == "per_head":
            want = [row.topk(count).indices.sort().values.tolist() for row in ranked[layer]]
        else:
            best = ranked[layer].flatten().topk(2 * count).indices
            want = [sorted((best[best // n == h] % n).tolist()) for h in (0, 1)]
        assert got[2 * layer : 2 * layer + 2] == want


def test_kvzip_is_told_apart_by_what_it_read(weights):
    _, dense = weights
    policy = KVzip(0.25).with_weights(dict(enumerate(dense)))
    other = KVzip(0.25).with_weights(dict(enumerate(dense + 1e-3)))
    assert policy.fingerprint() != other.fingerprint()
    moved = policy.to("meta")
    assert policy.to("cpu") is policy
    assert moved.weights[0].device.type == "meta"
    assert moved.n_up == policy.n_up


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3", "cohere", "glm"])
@torch.no_grad()
def test_rotation_is_that_of_the_model(name):
    """The same token again and again has the same key in the first layer, turned back."""
    config = {
        **FAMILIES,
        "gemma3": lambda: gemma3_config(layer_types=["full_attention"] * 3),
        "cohere": lambda: transformers.CohereConfig(**COMMON),  # neighbours turn together
        "glm": lambda: transformers.GlmConfig(**{**COMMON, "head_dim": 8}),  # and only half of them
    }[name]
    model = build(config(), torch.float64)
    rotation = rotation_of(model)
    cache = NAMMCache(model, NeverEvict(64))
    model(torch.full((1, 40), 7), past_key_values=cache)
    store = cache.layers[0].kv.store.segments
    keys = store.k[store.slices()[0]]
    if name == "gpt2":
        assert rotation == Rotation()
        return
    back = rotation.turn(keys, -torch.arange(40))
    torch.testing.assert_close(back, keys[:1].expand_as(back), atol=1e-5, rtol=1e-5)
    assert rotation.interleaved == (name in ("cohere", "glm"))
    mean = torch.stack([rotation.turn(keys, torch.full((40,), n)) for n in (3, 4, 5)]).mean(0)
    torch.testing.assert_close(rotation.turn(keys, torch.full((40,), 3), spread=3), mean)


@pytest.mark.parametrize("name", GRID)
def test_grid_is_small_and_protects_what_it_should(name):
    tried = GRID[name]
    assert 1 < len(tried) <= 6
    assert len({policy.fingerprint() for policy in tried}) == len(tried)
    for policy in tried:
        assert type(policy).__name__ == name
        assert policy.budget.size == 0.25
        assert policy.budget.sink_tokens >= 4


def test_docstring_examples():
    for module in (by_key, by_query, by_repetition, rotation):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed


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
        (lambda: LagKV(8, lag=0), "LagKV: lag must be at least 1, got 0"),
        (lambda: NestedKeyDiff(8, window=0), "NestedKeyDiff: window must be at least 1, got 0"),
        (lambda: ExpectedAttention(8, future=0), "ExpectedAttention: future must be at least 1"),
        (lambda: ExpectedAttention(8, epsilon=-1.0), "epsilon must be at least 0, got -1.0"),
        (lambda: ExpectedAttention(8).score(None), r"got None; use policy.for_model\(model\)"),
        (lambda: KVzip(8).score(None), r"got none; use policy.for_context"),
        (lambda: TOVA(8, heads="all"), "TOVA: heads must be 'layer' or 'head', got 'all'"),
    ],
)  # fmt: skip
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
