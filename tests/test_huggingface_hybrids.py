"""Memories beside other layers: stock where nothing is forgotten, and never silently wrong."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import transformers
from hf_models import evicting_policy, oracle_logits, oracle_of, positions, tokens
from hybrid_models import HYBRIDS, build_hybrid
from namm_ext import NAMMCache, apply, patch, remove
from namm_ext.baselines import H2O, NeverEvict, StreamingLLM
from namm_ext.cache.layer import NAMMLayer
from namm_ext.cache.versions import VERSION
from transformers import DynamicCache
from transformers.cache_utils import Cache

CUTS = (0, 40, 41, 60, 75)
#: Sinks, bounded logits, readers of other layers, latents.
OTHERS = ("gpt_oss", "gemma2", "gemma4_shared", "deepseek_v3")
RECURRENT = ("qwen3_5", "granite_4_h", "nemotron_h", "falcon_h1")


@torch.no_grad()
def feed(model, cache, ids, cuts=CUTS):
    """Logits of all tokens, fed in pieces."""
    return torch.cat(
        [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)], dim=1
    )


@pytest.mark.parametrize("name", HYBRIDS)
def test_never_evict_equals_stock(name):
    model, ids = build_hybrid(name), tokens(2, 75)
    want = feed(model, DynamicCache(config=model.config), ids)
    cache = NAMMCache(model, NeverEvict(n_up=16))
    torch.testing.assert_close(feed(model, cache, ids), want, atol=1e-9, rtol=1e-9)
    stock = DynamicCache(config=model.config).layers
    for layer, other in zip(cache.layers, stock, strict=True):
        kept = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
        memory = type(other).__name__ in kept
        assert isinstance(layer, NAMMLayer if memory else type(other))
    report = cache.report()
    assert report.full_bytes - report.sliding_bytes >= report.kv_bytes_live > 0
    remove(model)
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[0, :9] = 0
    for arguments in ({}, {"attention_mask": mask}, {"num_beams": 3}):
        # Up to the update behind 80 tokens, and two more.
        arguments = {**arguments, "max_new_tokens": 8, "do_sample": False}
        want = model.generate(ids, **arguments)
        with patch(model, NeverEvict(n_up=16)):
            assert torch.equal(model.generate(ids, **arguments), want), arguments.keys()


@pytest.mark.parametrize("name", HYBRIDS)
def test_evicting_equals_dense_oracle(name):
    """Read at once: some of stock's recurrent layers read otherwise in pieces."""
    model, ids = build_hybrid(name), tokens(1, 75)
    policy = evicting_policy(budget=9)
    cache = NAMMCache(model, policy)
    oracle = oracle_of(policy, cache)
    want = oracle_logits(model, oracle, ids)
    torch.testing.assert_close(feed(model, cache, ids, (0, 75)), want, atol=1e-9, rtol=1e-9)
    for layer in cache.memory_layers:
        assert positions(layer) == oracle.kept_positions(layer.layer_idx)


@pytest.mark.parametrize("name", HYBRIDS)
def test_pieces_do_not_matter(name):
    model, ids = build_hybrid(name), tokens(2, 75)
    policy = evicting_policy(budget=9)
    found = []
    for cuts in (CUTS, (0, 40, 75)):
        cache = NAMMCache(model, policy)
        feed(model, cache, ids, cuts)
        found.append([positions(layer, row) for layer in cache.memory_layers for row in (0, 1)])
    if found[0] != found[1]:  # only where stock itself reads differently in pieces
        whole, cut = (
            feed(model, DynamicCache(config=model.config), ids, c) for c in ((0, 75), CUTS)
        )
        assert not torch.allclose(cut, whole, atol=1e-6, rtol=0)
    assert min(len(head) for layer in found[0] for head in layer) < 40


def test_sinks_take_their_part_of_what_is_received():
    """Attention received, as H2O adds it up, is that of the eager model, sink left out."""
    model, ids = build_hybrid("gpt_oss"), tokens(2, 48)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    cache = NAMMCache(model, H2O(1.0, n_up=16))
    feed(model, cache, ids, (0, 48))
    for layer in cache.memory_layers:
        received = weights[layer.layer_idx].view(2, 2, 2, 48, 48).sum(3).mean(2)  # [B, H, T]
        state = layer.kv.store.segments.state
        ours = torch.stack([state[rows, 0] for rows in layer.kv.store.segments.slices()])
        torch.testing.assert_close(ours.view(2, 2, 48), received, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_5",
        "lfm2",
        "nemotron_h",
        "falcon_h1",
        "gpt_oss",
        "gemma2",
        "gemma4_shared",
        "deepseek_v3",
    ],
)
def test_a_cache_goes_on_from_its_file(name, tmp_path):
    model, ids = build_hybrid(name), tokens(2, 75)
    policy = StreamingLLM(8, 16)
    cache = NAMMCache(model, policy)
    feed(model, cache, ids, (0, 40))
    cache.save(tmp_path / "memory")
    again, twin = NAMMCache.load(tmp_path / "memory", model, policy), copy.deepcopy(cache)
    want = feed(model, cache, ids, (40, 41, 75))
    for other in (again, twin):
        torch.testing.assert_close(feed(model, other, ids, (40, 41, 75)), want, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "nemotron_h", "falcon_h1"])
def test_rows_and_another_batch(name):
    model, ids = build_hybrid(name), tokens(3, 75)
    policy = StreamingLLM(8, 16)
    cache = NAMMCache(model, policy)
    feed(model, cache, ids, (0, 40))
    cache.batch_select_indices(torch.tensor([2, 0]))
    got = feed(model, cache, ids[[2, 0]], (40, 60))
    alone = NAMMCache(model, policy)
    want = feed(model, alone, ids[[2, 0]], (0, 40, 60))[:, 40:]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    cache.reset()
    fresh = feed(model, NAMMCache(model, policy), ids[:1], (0, 40))
    torch.testing.assert_close(feed(model, cache, ids[:1], (0, 40)), fresh, atol=0, rtol=0)


@pytest.mark.parametrize(
    "name", ["lfm2", "llama4", "gpt_oss", "gemma2", "gemma4_shared", "deepseek_v3"]
)
def test_tokens_are_taken_back(name):
    model, ids = build_hybrid(name), tokens(2, 75)
    cache = NAMMCache(model, StreamingLLM(8, 16))
    feed(model, cache, ids, (0, 40))
    cache.activate_past_recording()
    feed(model, cache, ids.flip(1), (40, 50))
    cache.crop(-10)
    alone = NAMMCache(model, StreamingLLM(8, 16))
    want = feed(model, alone, ids, (0, 40, 75))[:, 40:]
    torch.testing.assert_close(feed(model, cache, ids, (40, 75)), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_cannot_be_cropped(name):
    model, ids = build_hybrid(name), tokens(2, 75)
    cache = NAMMCache(model, StreamingLLM(8, 16))
    feed(model, cache, ids, (0, 40))
    twin = copy.deepcopy(cache)
    cache.activate_past_recording()
    with pytest.raises(RuntimeError, match="layer 0 keeps a recurrent state, from which no"):
        cache.crop(-3)
    assert cache.get_seq_length() == 40
    cache.end_past_recording()
    want = feed(model, twin, ids, (40, 75))
    torch.testing.assert_close(feed(model, cache, ids, (40, 75)), want, atol=0, rtol=0)


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *((n, i) for n in ("qwen3_5", "lfm2", "granite_4_h", "falcon_h1") for i in range(4)),
        *((n, i) for n in ("gpt_oss", "gemma2") for i in range(4)),
        *(("deepseek_v3", i) for i in range(2)),
        *(("gemma4_shared", i) for i in range(7)),
    ],
)
def test_a_failed_call_is_undone_or_refused(name, layer, when):
    model, ids = build_hybrid(name), tokens(2, 75)
    policy = StreamingLLM(8, 16)
    want = feed(model, NAMMCache(model, policy), ids, (0, 40, 41, 75))
    cache = NAMMCache(model, policy)
    feed(model, cache, ids, (0, 40))

    module = model.model.layers[layer]
    hook = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    handle = hook(stop)
    with pytest.raises(Stop):
        feed(model, cache, ids, (40, 41))
    handle.remove()
    if (layer, when) == (len(model.model.layers) - 1, "after"):  # all of it was read
        assert cache.get_seq_length() == 41
        got = feed(model, cache, ids, (41, 75))
        torch.testing.assert_close(got, want[:, 41:], atol=1e-9, rtol=1e-9)
        return
    try:
        got = feed(model, cache, ids, (40, 41, 75))
    except ValueError as error:
        if "start again with cache.reset()" not in str(error):
            raise
        for use in (lambda: cache.crop(-1), lambda: cache.save("nowhere")):
            with pytest.raises(ValueError, match=r"start again with cache.reset\(\)"):
                use()
        cache.reset()
        got = feed(model, cache, ids, (0, 40, 41, 75))[:, 40:]
    torch.testing.assert_close(got, want[:, 40:], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5", "falcon_h1"])
def test_a_refused_call_changes_nothing(name):
    """The layers before the first memory have read it when the mask is found to be wrong."""
    model, ids = build_hybrid(name), tokens(2, 75)
    cache, twin = (NAMMCache(model, StreamingLLM(8, 16)) for _ in range(2))
    for c in (cache, twin):
        feed(model, c, ids, (0, 40))
    wrong = torch.ones(2, 50, dtype=torch.long)
    wrong[0, 20] = 0
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match="must not change for tokens"):
            model(ids[:, 40:50], attention_mask=wrong, past_key_values=cache)
    want = feed(model, twin, ids, (40, 50, 75))
    torch.testing.assert_close(feed(model, cache, ids, (40, 50, 75)), want, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["lfm2", "granite_4_h"])
def test_a_first_call_that_failed_is_forgotten(name):
    model, ids = build_hybrid(name), tokens(3, 75)
    cache = NAMMCache(model, StreamingLLM(8, 16))
    handle = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(Stop):
        feed(model, cache, ids, (0, 40))
    handle.remove()
    want = feed(model, NAMMCache(model, StreamingLLM(8, 16)), ids[:2], (0, 40, 75))
    torch.testing.assert_close(feed(model, cache, ids[:2], (0, 40, 75)), want, atol=0, rtol=0)


def test_masks_that_were_made_before():
    """Nothing says that a call begins but that a state is asked for again."""
    model, ids = build_hybrid("lfm2"), tokens(1, 75)
    cache, twin = (NAMMCache(model, StreamingLLM(8, 16)) for _ in range(2))
    for c in (cache, twin):
        feed(model, c, ids, (0, 40))
    masks = {"full_attention": None, "conv": None, "linear_attention": None}
    position_ids = torch.arange(40, 50)[None]

    def call(c):
        with torch.no_grad():
            return model(
                ids[:, 40:50], attention_mask=masks, position_ids=position_ids, past_key_values=c
            ).logits

    handle = model.model.layers[0].register_forward_hook(stop)
    with pytest.raises(Stop):
        call(cache)
    handle.remove()
    torch.testing.assert_close(call(cache), call(twin), atol=0, rtol=0)


def test_columns_that_were_not_recorded_cannot_be_taken_back():
    model, ids = build_hybrid("lfm2"), tokens(2, 75)
    cache = NAMMCache(model, NeverEvict(n_up=64))
    feed(model, cache, ids, (0, 40))
    cache.activate_past_recording()
    feed(model, cache, ids, (40, 45))
    with pytest.raises(RuntimeError, match="layer 0 has dropped what it would need"):
        cache.crop(-6)
    cache.crop(-5)
    want = feed(model, NAMMCache(model, NeverEvict(n_up=64)), ids, (0, 40, 75))[:, 40:]
    torch.testing.assert_close(feed(model, cache, ids, (40, 75)), want, atol=1e-9, rtol=0)


def test_a_recording_that_ends_within_the_convolution(tmp_path):
    """One token is less than a convolution sees."""
    model, ids = build_hybrid("lfm2"), tokens(2, 75)
    policy = NeverEvict(n_up=16)
    cache = NAMMCache(model, policy)
    cache.activate_past_recording()
    feed(model, cache, ids, (0, 1))
    cache.save(tmp_path / "memory")
    loaded = NAMMCache.load(tmp_path / "memory", model, policy)
    cache.end_past_recording()
    want = feed(model, NAMMCache(model, policy), ids, (0, 1, 40, 75))[:, 1:]
    for other in (cache, loaded):
        torch.testing.assert_close(feed(model, other, ids, (1, 40, 75)), want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_a_state_of_inference_mode_goes_on(name):
    model, ids = build_hybrid(name), tokens(2, 75)
    cache, fresh = (NAMMCache(model, StreamingLLM(8, 16)) for _ in range(2))
    with torch.inference_mode():
        model(ids[:, :40], past_key_values=cache)
    want = feed(model, fresh, ids, (0, 40, 41, 75))[:, 40:]
    torch.testing.assert_close(feed(model, cache, ids, (40, 41, 75)), want, atol=1e-9, rtol=0)


@pytest.mark.skipif(VERSION >= (5, 14), reason="there is one")
def test_without_a_cache_for_states_hybrids_are_refused():
    with pytest.raises(ValueError, match=r"'qwen3_5_text' has '.*'; transformers 5.* 5.14 has"):
        NAMMCache(HYBRIDS["qwen3_5"](), NeverEvict())


@pytest.mark.skipif(VERSION >= (5, 17), reason="it has transformers' own cache")
def test_a_model_with_a_cache_class_of_its_own_is_refused():
    with pytest.raises(ValueError, match="'olmo_hybrid' is not supported, it needs a cache class"):
        NAMMCache(HYBRIDS["olmo_hybrid"](), NeverEvict())


def test_keys_that_no_layer_is_known_to_own_are_refused(monkeypatch):
    config = build_hybrid("gemma4_shared").config
    monkeypatch.setattr(type(config), "kv_sharing_modes", None)  # as before transformers 5.24
    with pytest.raises(ValueError, match=r"the last 3 layers of 'gemma4_text' read keys of others"):
        NAMMCache(config, NeverEvict())


def test_apply_takes_them():
    for name in ("qwen3_5", "granite_4", "gpt_oss"):
        model = build_hybrid(name)
        memory = apply(model, StreamingLLM(8, 16))
        model.generate(tokens(1, 40), max_new_tokens=4)
        assert memory.report().tokens_kept < memory.report().tokens_seen
        remove(model)


def test_asking_for_a_state_is_reading():
    """Some versions of a layer ask whether there is one and then change it where it lies."""
    model, ids = build_hybrid("lfm2"), tokens(1, 40)
    cache = NAMMCache(model, StreamingLLM(8, 16))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    layer_idx = max(cache.session.recurrent.layers)
    assert cache.has_previous_state(layer_idx)
    with pytest.raises(ValueError, match=rf"failed, and layer {layer_idx} cannot go back"):
        cache.batch_select_indices(torch.tensor([0]))


@torch.no_grad()
def test_a_layer_between_memories_reads_a_call_once():
    """What it has read twice cannot be undone: the memories before it have taken the call."""
    if not hasattr(Cache, "get_conv_state"):
        pytest.skip(f"layers of transformers {transformers.__version__} read states by themselves")
    model, ids = build_hybrid("lfm2"), tokens(1, 40)
    cache = NAMMCache(model, StreamingLLM(8, 16))
    model(ids, past_key_values=cache)
    recurrent = cache.session.recurrent
    assert not recurrent._before  # old states are held no longer than a call
    layer_idx = next(i for i in recurrent.layers if recurrent.first < i < recurrent.last)
    cache.get_conv_state(layer_idx)
    with pytest.raises(ValueError, match=rf"failed, and layer {layer_idx} cannot go back"):
        cache.get_conv_state(layer_idx)
