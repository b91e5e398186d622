"""Taking tokens back and choosing rows: exact for every row, refused where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, gemma3_config, positions, tokens
from namm_ext import NAMMCache
from namm_ext.baselines import NeverEvict

PADS = (0, 9, 23)


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


@pytest.fixture
def policy():
    return evicting_policy(budget=10)


def batch(length):
    ids = tokens(3, length)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(PADS):
        mask[row, :pad] = 0
    return ids, mask


@torch.no_grad()
def feed(model, cache, ids, mask, a, b):
    position_ids = (mask[:, :b].cumsum(1) - 1).clamp(min=0)[:, a:b]
    return model(
        ids[:, a:b], attention_mask=mask[:, :b], position_ids=position_ids, past_key_values=cache
    ).logits


def same(cache, other, rows):
    for a, b in zip(cache.memory_layers, other.memory_layers, strict=True):
        assert a.kv.seen == b.kv.seen
        assert a.kv.lengths == b.kv.lengths == tuple(a.kv.store.segments.seqused_k.tolist())
        assert a.kv.overdue_rows == b.kv.overdue_rows
        assert [positions(a, r) for r in range(rows)] == [positions(b, r) for r in range(rows)]


# Rows are independent -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 80])
@pytest.mark.parametrize("removed", [1, 3, 8, 15, 16, 17, 30, 44])
def test_a_recorded_crop_of_rows_that_update_apart(model, policy, step, removed, tmp_path):
    """Rows 0, 9 and 23 columns apart: a crop undoes updates of some and keeps others'."""
    ids, mask = batch(80)
    cache, fresh = NAMMCache(model, policy), NAMMCache(model, policy)
    cache.activate_past_recording()
    for a in range(0, 80, step):
        feed(model, cache, ids, mask, a, min(a + step, 80))
    cache.crop(-removed)
    n = 80 - removed
    feed(model, fresh, ids, mask, 0, n)
    same(cache, fresh, 3)
    cache.save(tmp_path / "memory.safetensors")
    loaded = NAMMCache.load(tmp_path / "memory.safetensors", model, policy)
    want = feed(model, fresh, ids, mask, n, 80)
    for other in (cache, loaded):
        torch.testing.assert_close(feed(model, other, ids, mask, n, 80), want, atol=1e-9, rtol=0)
        same(other, fresh, 3)


def test_a_crop_to_the_end_of_a_period_keeps_its_update(model, policy):
    """Row 1 has 32 tokens and its update when row 0 takes tokens back behind an update."""
    ids, mask = batch(49)
    ids, mask = ids[:2], mask[:2]
    cache, fresh = NAMMCache(model, policy), NAMMCache(model, policy)
    cache.activate_past_recording()
    feed(model, cache, ids, mask, 0, 49)
    cache.crop(-8)  # 41 columns: rows of 41 and 32 tokens
    feed(model, fresh, ids, mask, 0, 41)
    same(cache, fresh, 2)
    assert cache.layers[0].kv.seen == (41, 32)


def test_a_crop_is_of_all_layers_or_none(policy):
    model = build(gemma3_config(layer_types=["full_attention", "sliding_attention",
                                             "full_attention"]), torch.float64)  # fmt: skip
    ids, cache = tokens(1, 40), NAMMCache(model, NeverEvict(n_up=64))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="crop: sliding layers have dropped tokens"):
            cache.crop(-3)
        assert [x.kv.seen for x in cache.memory_layers] == [(40,), (40,)]
        fresh = NAMMCache(model, NeverEvict(n_up=64))
        model(ids, past_key_values=fresh)
        more = tokens(1, 5, seed=2)
        torch.testing.assert_close(
            model(more, past_key_values=cache).logits, model(more, past_key_values=fresh).logits
        )


# Recording ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_recording_ends(model, policy):
    """With a call, with reset, or when nobody takes tokens back any more."""
    ids = tokens(1, 300)

    def recorded(cache):
        report = cache.report()
        assert report.recorded_bytes == sum(x.recorded_bytes for x in report.layers)
        assert report.total_bytes == cache.session.ledger.kv + cache.session.ledger.memory
        assert report.to_dict()["totals"]["recorded_bytes"] == report.recorded_bytes
        return report.recorded_bytes

    cache = NAMMCache(model, policy)
    cache.activate_past_recording()
    model(ids[:, :100], past_key_values=cache)
    assert recorded(cache) > 3 * cache.report().kv_bytes
    cache.end_past_recording()
    assert recorded(cache) == 0
    assert not cache.is_recording
    cache.activate_past_recording()
    model(ids[:, 100:200], past_key_values=cache)
    assert recorded(cache)
    cache.reset()
    model(ids[:, :100], past_key_values=cache)
    assert recorded(cache) == 0

    cache.activate_past_recording()
    model(ids[:, 100:160], past_key_values=cache)
    cache.crop(-1)
    for n in range(159, 159 + 128):
        model(ids[:, n : n + 1], past_key_values=cache)
        assert cache.is_recording
    cache.crop(0)  # whoever drafts says so
    assert recorded(cache) == 0
    for n in range(287, 300):
        model(ids[:, n : n + 1], past_key_values=cache)
    assert cache.is_recording
    for n in range(116):
        model(ids[:, n : n + 1], past_key_values=cache)
    assert not cache.is_recording
    assert recorded(cache) == 0


@torch.no_grad()
def test_a_recording_hybrid_is_saved_without_its_past(policy, tmp_path):
    model = build(gemma3_config(), torch.float64)
    cache, more = NAMMCache(model, policy), tokens(1, 9, seed=4)
    cache.activate_past_recording()
    model(tokens(1, 60), past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    loaded = NAMMCache.load(tmp_path / "memory.safetensors", model, policy)
    assert [x.keys.shape[2] for x in loaded.sliding_layers] == [23, 23]
    a, b = (model(more, past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@torch.no_grad()
def test_sliding_layers_stop_recording_too(policy):
    model = build(gemma3_config(), torch.float64)
    cache = NAMMCache(model, policy)
    cache.activate_past_recording()
    model(tokens(1, 60), past_key_values=cache)
    assert [x.keys.shape[2] for x in cache.sliding_layers] == [60, 60]
    cache.end_past_recording()
    assert [x.keys.shape[2] for x in cache.sliding_layers] == [23, 23]
    assert not any(x.record_past for x in cache.sliding_layers)
    fresh, more = NAMMCache(model, policy), tokens(1, 9, seed=4)
    model(tokens(1, 60), past_key_values=fresh)
    torch.testing.assert_close(
        model(more, past_key_values=cache).logits, model(more, past_key_values=fresh).logits
    )


# Rows ---------------------------------------------------------------------------------------------


def test_selected_rows_without_padding_need_no_mask(model, policy):
    ids, mask = batch(30)
    cache = NAMMCache(model, policy)
    feed(model, cache, ids, mask, 0, 30)
    cache.batch_select_indices(torch.tensor([0]))
    fresh = NAMMCache(model, policy)
    with torch.no_grad():
        model(ids[:1], past_key_values=fresh)
        a, b = (model(tokens(1, 9, seed=5), past_key_values=c).logits for c in (cache, fresh))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("indices", [[-1, 0], [2, 0], [True, False, True]], ids=str)
def test_rows_count_as_in_python(model, policy, indices):
    ids, mask = batch(30)
    rows = torch.arange(3)[torch.tensor(indices)]
    for change in ("batch_select_indices", "reorder_cache"):
        cache, fresh = NAMMCache(model, policy), NAMMCache(model, policy)
        feed(model, cache, ids, mask, 0, 30)
        getattr(cache, change)(torch.tensor(indices))
        feed(model, fresh, ids[rows], mask[rows], 0, 30)
        same(cache, fresh, 2)


BAD_ROWS = {
    "too large": torch.tensor([3]), "too small": torch.tensor([-4]), "none": torch.tensor([]),
    "none left": torch.zeros(3, dtype=torch.bool), "short": torch.tensor([True]),
    "floats": torch.tensor([1.0]), "square": torch.tensor([[0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_are_not_there(model, policy, name):
    ids, mask = batch(30)
    cache, fresh = NAMMCache(model, policy), NAMMCache(model, policy)
    for c in (cache, fresh):
        feed(model, c, ids, mask, 0, 30)
    for change in (cache.batch_select_indices, cache.reorder_cache):
        with pytest.raises(IndexError, match="rows must be a non-empty list of indices below 3"):
            change(BAD_ROWS[name])
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        cache.batch_repeat_interleave(0)
    same(cache, fresh, 3)


def test_layers_by_themselves(model, policy):
    cache = NAMMCache(model, policy)
    assert not cache.is_initialized
    with torch.no_grad():
        model(tokens(2, 5), past_key_values=cache)
    assert cache.is_initialized
    assert all(layer.is_initialized for layer in cache.layers)
    with pytest.raises(ValueError, match=r"use cache\.reorder_cache, got a call on layer 1"):
        cache.layers[1].reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert not cache.is_initialized


# Modes --------------------------------------------------------------------------------------------

MODES = [torch.inference_mode, torch.no_grad]


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_cache_of_one_mode_goes_on_in_the_other(policy, kind, first, tmp_path):
    """What is made in inference mode could not be written to outside."""
    second = MODES[MODES[0] is first]
    model = build(gemma3_config() if kind == "gemma3" else FAMILIES[kind](), torch.float64)
    ids, mask = batch(79)
    cache, fresh = NAMMCache(model, policy), NAMMCache(model, policy)
    with first():
        cache.activate_past_recording()
        feed(model, cache, ids, mask, 0, 50)
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        twin = copy.deepcopy(cache)
        cache.save(tmp_path / "memory.safetensors")
        loaded = NAMMCache.load(tmp_path / "memory.safetensors", model, policy)
    ids, mask = ids[[1, 0, 2]], mask[[1, 0, 2]]
    feed(model, fresh, ids, mask, 0, 47)
    want = feed(model, fresh, ids, mask, 47, 79)
    for other in (cache, twin, loaded):
        with second():
            got = torch.cat([feed(model, other, ids, mask, n, n + 1) for n in range(47, 79)], 1)
            if kind == "llama":
                other.crop(-1)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
