"""Attention of other kinds: bounded logits, layers that read another layer's keys, latents."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hf_models import evicting_policy, positions, tokens
from hybrid_models import build_hybrid
from namm_ext import Budget, NAMMCache, NAMMConfig, remove
from namm_ext.baselines import NeverEvict, StreamingLLM
from namm_ext.cache import layer, session
from namm_ext.cache.versions import VERSION
from namm_ext.fitting import FitConfig, Later, Text, fit
from transformers import DynamicCache

CUTS = (0, 40, 41, 60, 75)
latents = pytest.mark.skipif(VERSION < (5, 17), reason="transformers expands them")


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
def test_bounded_logits_are_those_of_the_eager_model(name):
    """In float32: eager rounds its softmax to it, and in float64 its padded rows are NaN."""
    model, ids = build_hybrid(name, torch.float32), tokens(2, 75)
    model.set_attn_implementation("eager")
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[0, :9] = 0
    real = mask.bool()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[real]
        cache = NAMMCache(model, NeverEvict(n_up=16))
        got = model(ids, attention_mask=mask, past_key_values=cache).logits[real]
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        free = model(ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-5)
    assert float((free - want).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["gemma3n_shared", "gemma4_shared"])
@torch.no_grad()
def test_layers_that_read_what_another_remembers(name):
    """However a call is cut, in batches with padding, also where only the last logits are wanted;
    and nothing is held for readers that have read."""
    model, ids = build_hybrid(name), tokens(2, 75)
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[0, :9] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    alone = NAMMCache(model, evicting_policy(budget=9))
    want = model(ids[:1, 9:], past_key_values=alone).logits
    for cuts in ((0, 75), (0, 20, 75), CUTS):
        cache = NAMMCache(model, evicting_policy(budget=9))
        logits = torch.cat(
            [
                model(
                    ids[:, a:b],
                    attention_mask=mask[:, :b],
                    position_ids=at[:, a:b],
                    past_key_values=cache,
                ).logits
                for a, b in pairwise(cuts)
            ],
            dim=1,
        )
        torch.testing.assert_close(logits[:1, 9:], want, atol=1e-9, rtol=1e-9)
        assert all(x.replay is None for x in cache.memory_layers)
        owner = next(x for x in cache.memory_layers if x.readers)
        assert [positions(owner, 0), positions(owner, 1)] == [
            positions(alone.memory_layer(owner.layer_idx), 0),
            positions(owner, 1),
        ]
    few = model(ids[:, :12], use_cache=False).logits[:, -5:]  # fewer than the window
    cache = NAMMCache(model, NeverEvict(n_up=16))
    some = model(ids[:, :12], past_key_values=cache, logits_to_keep=5).logits
    torch.testing.assert_close(some, few, atol=1e-9, rtol=1e-9)
    for keep in (1, 5, 40):
        cache = NAMMCache(model, evicting_policy(budget=9))
        some = model(
            ids, attention_mask=mask, position_ids=at, past_key_values=cache, logits_to_keep=keep
        ).logits
        torch.testing.assert_close(some[:, -1], logits[:, -1], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(some[:1], want[:, -keep:], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_reader_holds_no_stores_of_a_long_call():
    """Between the first and the last, positions alone."""
    model, ids = build_hybrid("gemma4_shared"), tokens(1, 512)
    cache = NAMMCache(model, StreamingLLM(32, n_up=16))
    held = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            owner = cache.memory_layers[1]
            if owner.replay is not None:
                held.append(owner.replay.nbytes)
            return function(*args, **(kwargs or {}))

    with Watch():
        model(ids, past_key_values=cache)
    row = 2 * 2 * 8 * 8  # heads, k and v of 8 numbers in float64
    assert max(held) <= (512 + 48) * row  # all of the call once, and the first store
    assert cache.memory_layers[1].replay is None


@latents
@torch.no_grad()
def test_a_memory_of_latents(tmp_path):
    """One head of latents for all query heads; bytes are counted against the stock cache's."""
    model, ids = build_hybrid("deepseek_v3"), tokens(2, 80)
    cache = NAMMCache(model, StreamingLLM(0.25, n_up=16))
    model(ids, past_key_values=cache)
    stock = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    model(ids, past_key_values=stock)
    held = sum(x.keys.nbytes + x.values.nbytes for x in stock.layers)
    report = cache.report()
    assert report.full_bytes == held
    rank, rope = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    assert cache.layers[0].kv.store.segments.k.shape[1] == rank + rope
    assert report.layers[0].kept == ((20,), (20,))
    assert report.kv_bytes_live == 2 * 2 * 20 * (rank + rope) * 8 == held // 4
    path = tmp_path / "memory.safetensors"
    cache.save(path)
    remove(model)
    loaded = NAMMCache.load(path, model, StreamingLLM(0.25, n_up=16))
    later = tokens(2, 30, seed=1)
    want, got = (model(later, past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@torch.no_grad()
def test_latents_in_16_bits_are_as_good_as_stock():
    exact, ids = build_hybrid("deepseek_v3"), tokens(2, 80)
    want = exact(ids).logits
    model = copy.deepcopy(exact).to(torch.bfloat16)
    stock = model(ids).logits
    got = model(ids, past_key_values=NAMMCache(model, NeverEvict(n_up=16))).logits
    ours, theirs = ((x.double() - want).pow(2).mean().sqrt() for x in (got, stock))
    assert ours <= 1.5 * theirs


@latents
@torch.no_grad()
def test_weights_that_cannot_be_absorbed_are_refused():
    model, ids = build_hybrid("deepseek_v3"), tokens(1, 20)
    module = model.model.layers[1].self_attn
    plain = module.kv_b_proj
    module.kv_b_proj = torch.nn.Linear(plain.in_features, plain.out_features, dtype=torch.float64)
    with pytest.raises(ValueError, match="kv_b_proj with plain weights and no bias, DeepseekV3"):
        model(ids, past_key_values=NAMMCache(model, NeverEvict(n_up=16)))


@latents
def test_latents_are_calibrated_and_fitted():
    model = build_hybrid("deepseek_v3", torch.float32)
    texts = [Text(tuple(row), (Later(tuple(row)),)) for row in tokens(3, 64).tolist()]
    config = FitConfig(NAMMConfig(n_up=16, scorer="none"), budget=Budget(0.5, scope="global"))
    policy = fit(model, texts, config).policy
    assert policy.calibration.offsets.shape == (2, 1)  # layers, heads of latents
    cache = NAMMCache(model, policy)
    with torch.no_grad():
        model(tokens(1, 64), past_key_values=cache)
    assert cache.report().kept_fraction == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_a_layer_that_is_not_known_to_read_is_refused():
    model, ids = build_hybrid("gemma4_shared"), tokens(1, 20)
    cache = NAMMCache(model, NeverEvict(n_up=16))
    owner = next(x for x in cache.memory_layers if x.readers)
    unknown, *owner.readers = owner.readers
    with pytest.raises(ValueError, match=f"are used more than once, by layer {unknown}, and"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["gemma4_shared", "deepseek_v3"])
@torch.no_grad()
def test_updates_at_the_end_of_a_call(name, monkeypatch):
    """As on a device that the host would wait for: all layers' updates are made together."""
    model, ids = build_hybrid(name), tokens(2, 75)

    def read():
        cache = NAMMCache(model, evicting_policy(budget=9))
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(CUTS)]
        return torch.cat(parts, dim=1), [positions(x, 1) for x in cache.memory_layers]

    want, kept = read()
    for module in (layer, session):
        monkeypatch.setattr(module, "waits", lambda device: True)
    got, together = read()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert together == kept
