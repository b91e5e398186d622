"""The drop-in computes what it promises: stock without eviction, the dense oracle with it.

Keep decisions are sign tests, so whatever is compared after evictions runs in float64.
"""

from __future__ import annotations

import doctest
import importlib
from itertools import pairwise

import pytest
import torch
import transformers
from hf_models import (
    COMMON,
    FAMILIES,
    VOCAB,
    build,
    evicting_policy,
    gemma3_config,
    greedy,
    namm_oracle,
    oracle_logits,
    positions,
    tokens,
)
from namm_ext import NAMM, Budget, NAMMCache, NAMMConfig, apply, patch, remove
from namm_ext.baselines import NeverEvict
from namm_ext.cache.attention import namm_attention_forward
from namm_ext.cache.layer import NAMMLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

LENGTH = 75  # not a multiple of anything


def feed(model, cache, ids, cuts=(), mask=None):
    """Logits of all tokens, fed in pieces that end at the given columns."""
    logits = []
    with torch.no_grad():
        for a, b in pairwise((0, *cuts, ids.shape[1])):
            part = None if mask is None else mask[:, :b]
            position_ids = None
            if mask is not None:
                position_ids = (part.cumsum(1) - 1).clamp(min=0)[:, a:b]
            logits.append(
                model(
                    ids[:, a:b], attention_mask=part, past_key_values=cache,
                    position_ids=position_ids,
                ).logits
            )  # fmt: skip
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_evict_equals_stock(family):
    model = build(FAMILIES[family]())
    ids = tokens(2, LENGTH)
    want = model(ids).logits
    policy = NAMM(NAMMConfig(n_up=16))  # zero parameters: every score is 0, and 0 stays
    got = feed(model, NAMMCache(model, policy), ids, cuts=(40, 41, 60))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    remove(model)
    stock = model.generate(ids, max_new_tokens=20, do_sample=False)
    ours = model.generate(
        ids, max_new_tokens=20, do_sample=False, past_key_values=NAMMCache(model, policy)
    )
    assert torch.equal(ours, stock)


def test_never_evict_equals_stock_in_bfloat16():
    model = build(FAMILIES["llama"](), torch.bfloat16)
    exact = build(FAMILIES["llama"](), torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = tokens(2, LENGTH)
    want, stock = exact(ids).logits, model(ids).logits
    got = feed(model, NAMMCache(model, NeverEvict(n_up=16)), ids, cuts=(40,))
    assert got.dtype == torch.bfloat16
    ours, theirs = (got.double() - want).norm(), (stock.double() - want).norm()
    assert ours <= 2 * theirs


def test_hybrid_keeps_stock_sliding_layers():
    model = build(gemma3_config())
    ids = tokens(2, LENGTH)
    want = model(ids).logits
    cache = NAMMCache(model, NAMM(NAMMConfig(n_up=16)))
    got = feed(model, cache, ids, cuts=(30, 70, 71))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert [isinstance(x, DynamicSlidingWindowLayer) for x in cache.layers] == [True, True, False]
    assert isinstance(cache.layers[2], NAMMLayer)
    report = cache.report()
    assert report.sliding_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers[:2])


BUDGETS = {
    "threshold": Budget(threshold=0.0),
    "original": Budget(threshold=0.0, selection="original"),
    "per_head": Budget(12),
    "per_layer": Budget(12, scope="per_layer"),
    "both": Budget(20, threshold=0.0, sink_tokens=2, recent_tokens=4),
    "evict_all": Budget(threshold=1e9),
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_evicting_equals_dense_oracle(budget):
    model = build(FAMILIES["llama"](), torch.float64)
    ids = tokens(1, LENGTH)
    policy = evicting_policy(budget=BUDGETS[budget])
    oracle = namm_oracle(policy)
    want = oracle_logits(model, oracle, ids)
    cache = NAMMCache(model, policy)
    got = feed(model, cache, ids, cuts=(50, 51))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    for layer in cache.layers:
        kept = oracle.kept_positions(layer.layer_idx)
        assert positions(layer) == kept
        assert sum(map(len, kept)) < 0.8 * 2 * LENGTH  # the test evicts


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_families_equal_dense_oracle(family):
    model = build(FAMILIES[family](), torch.float64)
    ids = tokens(1, 52)
    policy = evicting_policy(budget=9)
    oracle = namm_oracle(policy)
    want = oracle_logits(model, oracle, ids)
    cache = NAMMCache(model, policy)
    torch.testing.assert_close(feed(model, cache, ids, cuts=(20,)), want, atol=1e-9, rtol=1e-9)
    assert positions(cache.layers[1]) == oracle.kept_positions(1)


@pytest.mark.parametrize("n_up", [16, 32, 48])
def test_generated_tokens_equal_dense_oracle(n_up):
    model = build(FAMILIES["llama"](), torch.float64)
    ids = tokens(1, 60)
    policy = evicting_policy(n_up, budget=10)
    cache = NAMMCache(model, policy)
    out = model.generate(ids, max_new_tokens=50, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == out.shape[1] - 1
    oracle = namm_oracle(policy)
    logits = oracle_logits(model, oracle, out[:, :-1])
    assert torch.equal(logits[:, 59:].argmax(-1), out[:, 60:])
    assert positions(cache.layers[0]) == oracle.kept_positions(0)


CUTS = {
    "aligned": range(16, LENGTH, 16),
    "one_by_one": range(1, LENGTH),
    "ragged": (1, 4, 33, 34, 35, 64, 70),
}


@pytest.mark.parametrize("cuts", CUTS)
def test_any_chunking_gives_the_same_result(cuts):
    model = build(FAMILIES["llama"](), torch.float64)
    ids = tokens(2, LENGTH)
    policy = evicting_policy(budget=Budget(11, scope="per_layer"))
    whole, parts = NAMMCache(model, policy), NAMMCache(model, policy)
    want = feed(model, whole, ids)
    got = feed(model, parts, ids, cuts=tuple(CUTS[cuts]))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert [positions(a, r) for r in (0, 1)] == [positions(b, r) for r in (0, 1)]
        rows, _ = a.kv.store.segments.live_rows()
        torch.testing.assert_close(a.kv.store.segments.state[rows], b.kv.store.segments.state[rows])


@pytest.mark.parametrize("cuts", [(), (10, 17, 40, 41), (64,)], ids=["whole", "ragged", "aligned"])
@pytest.mark.parametrize("pads", [(0, 9, 23), (1, 16, 17)], ids=["0-9-23", "1-16-17"])
def test_left_padded_rows_equal_rows_alone(pads, cuts):
    model = build(FAMILIES["llama"](), torch.float64)
    ids = tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    for row, n in enumerate(pads):
        mask[row, :n], ids[row, :n] = 0, 0
    policy = evicting_policy(budget=9)
    cache = NAMMCache(model, policy)
    got = feed(model, cache, ids, cuts, mask)
    for row, n in enumerate(pads):
        alone = NAMMCache(model, policy)
        want = feed(model, alone, ids[row : row + 1, n:])
        torch.testing.assert_close(got[row : row + 1, n:], want, atol=1e-9, rtol=1e-9)
        for layer, single in zip(cache.layers, alone.layers, strict=True):
            assert positions(layer, row) == positions(single)
    assert cache.layers[0].kv.seen == tuple(LENGTH - n for n in pads)


def test_left_padding_equals_stock_without_eviction():
    model = build(FAMILIES["llama"]())
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13], ids[0, :13] = 0, 0
    stock = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    cache = NAMMCache(model, NeverEvict(n_up=16))
    ours = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, past_key_values=cache
    )
    assert torch.equal(ours, stock)


def test_population_rows_use_their_own_parameters():
    model = build(FAMILIES["llama"](), torch.float64)
    ids = tokens(1, LENGTH).expand(4, -1)
    one, two = (evicting_policy(budget=10, seed=s) for s in (1, 2))
    bank = one.with_params(torch.stack([one.params, two.params]))
    index = [1, 0, 1, 0]
    cache = NAMMCache(model, bank, param_index=torch.tensor(index))
    got = feed(model, cache, ids)
    differ = False
    for row, i in enumerate(index):
        alone = NAMMCache(model, (one, two)[i])
        want = feed(model, alone, ids[:1])
        torch.testing.assert_close(got[row : row + 1], want, atol=1e-9, rtol=1e-9)
        assert positions(cache.layers[1], row) == positions(alone.layers[1])
        assert cache.kept_fraction_per_row()[row] == alone.kept_fraction_per_row()
        differ |= positions(cache.layers[1], row) != positions(cache.layers[1], 0)
    assert differ


def test_without_a_memory_namm_attention_is_stock():
    config = FAMILIES["llama"]()
    stock = build(config)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    want = [stock(ids).logits, stock(ids, attention_mask=mask).logits[:, 13:]]
    want_tokens = stock.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    stock.set_attn_implementation("namm")
    got = [stock(ids).logits, stock(ids, attention_mask=mask).logits[:, 13:]]
    torch.testing.assert_close(got, want)
    assert torch.equal(
        stock.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), want_tokens
    )


def test_autocast_and_inference_mode():
    model = build(FAMILIES["llama"]())
    ids = tokens(1, 40)
    exact = model(ids).logits
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        stock = model(ids).logits
        cache = NAMMCache(model, NeverEvict(n_up=16))
        got = model(ids, past_key_values=cache).logits
    assert cache.layers[0].kv.store.segments.k.dtype == torch.bfloat16
    assert (got - exact).norm() <= 2 * (stock - exact).norm()


@torch.no_grad()
def test_autocast_casts_what_sdpa_would():
    """Queries and keys in float32 beside values in bfloat16, in any mixture."""
    model = build(FAMILIES["llama"]())
    attention, low = model.model.layers[0].self_attn, torch.bfloat16
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for dtypes in ((low, low, torch.float32), (torch.float32, low, low), (low, torch.float32, low)):
        cache = NAMMCache(model, NeverEvict(n_up=16))
        mixed = [x.to(dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
        with torch.autocast("cpu", low):
            key, value = cache.update(*mixed[1:], 0)
            out, _ = namm_attention_forward(attention, mixed[0], key, value, None)
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.to(low).double() for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        assert out.dtype == cache.layers[0].kv.store.segments.v.dtype == low
        torch.testing.assert_close(out.double(), want.transpose(1, 2), atol=2**-7, rtol=2**-7)


# Composite models ---------------------------------------------------------------------------------


@pytest.fixture
def llava():
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=4, projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(**COMMON),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    return model.requires_grad_(False)


def test_multimodal_model(llava):
    """Only the decoder gets a memory; an image's tokens are tokens like any others."""
    ids = tokens(1, 50).clamp(max=VOCAB - 2)
    ids[0, 5:21] = VOCAB - 1
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.float64)}
    want = llava.generate(**inputs, max_new_tokens=20, do_sample=False)
    vision = llava.config.vision_config
    before = vision._attn_implementation
    apply(llava, NeverEvict(n_up=16))
    assert llava.config.text_config._attn_implementation == "namm"
    assert vision._attn_implementation == before
    assert torch.equal(llava.generate(**inputs, max_new_tokens=20, do_sample=False), want)

    policy = evicting_policy(budget=10)
    seen = []
    hook = llava.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    cache = NAMMCache(llava, policy)
    got = llava(**inputs, past_key_values=cache).logits
    hook.remove()
    alone = NAMMCache(llava.config.text_config, policy)
    hidden = llava.model.language_model(inputs_embeds=seen[0], past_key_values=alone)
    torch.testing.assert_close(got, llava.lm_head(hidden.last_hidden_state))
    assert positions(cache.layers[1]) == positions(alone.layers[1])
    remove(llava)
    assert llava.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(llava.generate(**inputs, max_new_tokens=20, do_sample=False), want)


def test_images_that_are_read_in_both_directions():
    """Token types of a text alone change nothing; blocks of an image are refused, with a reason."""
    torch.manual_seed(0)
    text = gemma3_config()
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    ids = tokens(2, 40).clamp(max=VOCAB - 4)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    inputs = {"attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    want = greedy(model, ids, **inputs)
    with patch(model, NeverEvict(n_up=16)):
        assert torch.equal(greedy(model, ids, **inputs), want)
        ids[:, 10:14] = VOCAB - 1
        inputs["token_type_ids"] = (ids == VOCAB - 1).long()
        image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        with pytest.raises(ValueError, match="4-D and bidirectional masks are not supported"):
            greedy(model, ids, **inputs, pixel_values=image)


MODULES = "ragged.planner cache.cache patching baselines._base baselines.by_key"
MODULES += " baselines.by_position baselines.by_attention"


@pytest.mark.parametrize("name", MODULES.split())
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"namm_ext.{name}")).failed == 0
