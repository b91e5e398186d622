"""Everything ``generate`` does with a dynamic cache, done with a memory."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hf_models import (
    FAMILIES,
    VOCAB,
    build,
    evicting_policy,
    gemma3_config,
    greedy,
    positions,
    tokens,
)
from namm_ext import NAMMCache, apply, patch, remove
from namm_ext.baselines import NeverEvict
from namm_ext.cache import cache_keyword
from namm_ext.cache.versions import VERSION
from transformers import DynamicCache


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


@pytest.fixture
def policy():
    return evicting_policy(budget=10)


# Undoing and repeating ----------------------------------------------------------------------------


def test_patch_is_undone_exactly(model, policy):
    config = copy.deepcopy(model.config.to_dict())
    before = dict(vars(model)), model.config._attn_implementation
    ids = tokens(1, 40)
    want = greedy(model, ids)
    with patch(model, policy) as memory:
        assert model.config._attn_implementation == "namm"
        with pytest.raises(ValueError, match=r"patch: no cache yet, call model.generate first"):
            memory.report()
        inside = greedy(model, ids)
        assert memory.report().layers[0].num_updates == 4
    assert (dict(vars(model)), model.config._attn_implementation) == before
    assert model.config.to_dict() == config
    assert torch.equal(greedy(model, ids), want)
    assert not torch.equal(inside, want)


def test_patch_is_undone_after_an_error(model, policy):
    before = dict(vars(model))
    with pytest.raises(KeyError), patch(model, policy):
        raise KeyError
    assert dict(vars(model)) == before
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_of_ones_own_under_either_name(model, policy):
    """transformers 5.24 calls ``cache`` what was ``past_key_values``."""
    ids = tokens(1, 40)
    for name in {"past_key_values", cache_keyword(model)}:
        cache = NAMMCache(model, policy)
        with patch(model, policy) as memory:
            greedy(model, ids, **{name: cache})
            assert memory.cache is cache
            greedy(model, ids, **{name: None})
            assert memory.cache is not cache


def test_nested_patches_and_apply(model, policy):
    ids = tokens(1, 40)
    outer = apply(model, policy)
    one = greedy(model, ids)
    with patch(model, NeverEvict(n_up=16)) as inner:
        two = greedy(model, ids)
        assert inner.report().policy == "NeverEvict"
    assert torch.equal(greedy(model, ids), one)
    assert outer.policy is policy
    remove(model)
    remove(model)  # a model without memory is fine
    assert "generate" not in vars(model)
    assert torch.equal(greedy(model, ids), two)


def test_model_loaded_with_namm_attention(tmp_path, model, policy):
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="namm", dtype=torch.float64
    )
    ids = tokens(1, 40)
    with patch(model, policy):
        want = greedy(model, ids)
    cache = NAMMCache(loaded.config, policy)
    assert torch.equal(greedy(loaded, ids, past_key_values=cache), want)
    with patch(loaded, policy):
        assert torch.equal(greedy(loaded, ids), want)
    assert loaded.config._attn_implementation == "namm"


# Ways to generate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 13},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 5, "eos_token_id": VOCAB},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_never_evict_generates_as_stock(model, kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": 30, **kwargs}
    ids = tokens(1, 40).repeat(1, 2)
    torch.manual_seed(3)
    want = model.generate(ids, **kwargs)
    torch.manual_seed(3)
    with patch(model, NeverEvict(n_up=16)) as memory:
        got = model.generate(ids, **kwargs)
    if "return_dict_in_generate" in kwargs:
        assert memory.cache is got.past_key_values
        want, got = want.sequences, got.sequences
    assert torch.equal(got, want)
    assert memory.cache.layers[0].kv.num_updates >= 4


@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5, "eos_token_id": VOCAB}, {"do_sample": True}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_hybrid_generates_as_stock(kwargs):
    """Stock sliding layers are reordered and rolled back along with the memory."""
    model = build(gemma3_config(), torch.float64)
    kwargs = {"do_sample": False, "max_new_tokens": 30, **kwargs}
    ids = tokens(1, 40).repeat(1, 2)
    torch.manual_seed(3)
    want = model.generate(ids, **kwargs)
    torch.manual_seed(3)
    with patch(model, NeverEvict(n_up=16)):
        assert torch.equal(model.generate(ids, **kwargs), want)


def test_beams_equal_their_replay(model, policy):
    ids = tokens(2, 37)
    with patch(model, policy):
        out = model.generate(
            ids, num_beams=3, num_return_sequences=3, max_new_tokens=30, do_sample=False,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        with torch.no_grad():
            logits = model(sequence[None, :-1], past_key_values=NAMMCache(model, policy)).logits
        log_probs = logits[0, 36:].log_softmax(-1).gather(1, sequence[37:, None])
        torch.testing.assert_close(log_probs.sum().to(score.dtype), score, rtol=1e-5, atol=1e-4)
    remove(model)


class Draft(transformers.generation.candidate_generator.CandidateGenerator):
    """Proposes the true continuation with mistakes, so that drafts are partly rejected."""

    def __init__(self, truth, width):
        self.truth, self.width, self.calls = truth, width, 0

    def get_candidates(self, input_ids, *args, **kwargs):
        n = input_ids.shape[1]
        draft = self.truth[:, n : n + self.width].clone()
        self.calls += 1
        if draft.shape[1] > 2:
            wrong = self.calls % draft.shape[1]
            draft[:, wrong] = (draft[:, wrong] + 1) % 90 + 2
        return torch.cat([input_ids, draft], dim=1), None

    def update_candidate_strategy(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("width", [3, 7, 40])
def test_assisted_equals_greedy_across_updates(model, policy, width, monkeypatch):
    """Drafts are rejected behind an update: what the update dropped must come back."""
    ids = tokens(1, 40)
    with patch(model, policy) as memory:
        want = greedy(model, ids, max_new_tokens=60)
        kept = [positions(layer) for layer in memory.cache.layers]
        draft = Draft(want, width)
        monkeypatch.setattr(type(model), "_get_candidate_generator", lambda *a, **k: draft)
        got = greedy(model, ids, max_new_tokens=60, prompt_lookup_num_tokens=width)
        assert torch.equal(got, want)
        cache = memory.cache
        cache.crop(want.shape[1] - 1)
        assert [positions(layer) for layer in cache.layers] == kept
    assert draft.calls > 2


def test_assistant_model(model, policy):
    ids = tokens(1, 40)
    assistant = build(FAMILIES["llama"](), torch.float64, seed=1)
    with patch(model, policy):
        want = greedy(model, ids)
        assert torch.equal(greedy(model, ids, assistant_model=assistant), want)


def test_several_turns_equal_one(model, policy):
    ids = tokens(1, 30)
    cache = NAMMCache(model, policy)
    text, question = ids, tokens(1, 13, seed=5)
    for _ in range(3):
        text = greedy(model, text, past_key_values=cache, max_new_tokens=11)
        text = torch.cat([text, question], dim=1)
    fresh = NAMMCache(model, policy)
    with torch.no_grad():
        model(text[:, : cache.get_seq_length()], past_key_values=fresh)
    assert fresh.get_seq_length() == cache.get_seq_length() == text.shape[1] - 14
    assert [positions(x) for x in cache.layers] == [positions(x) for x in fresh.layers]
    remove(model)


def test_chunked_prefill_of_a_second_turn(model, policy):
    """Old transformers fed the whole prompt again here; the cache must end at the right length."""
    cache = NAMMCache(model, policy)
    text = greedy(model, tokens(1, 30), past_key_values=cache, max_new_tokens=11)
    text = torch.cat([text, tokens(1, 40, seed=5)], dim=1)
    if VERSION < (5, 20):
        with pytest.raises(ValueError, match=r"once more: leave it out for this turn"):
            greedy(model, text, past_key_values=cache, max_new_tokens=5, prefill_chunk_size=7)
        stock = DynamicCache()
        remove(model)
        greedy(model, tokens(1, 30), past_key_values=stock, max_new_tokens=11)
        out = greedy(model, text, past_key_values=stock, max_new_tokens=5, prefill_chunk_size=7)
        assert stock.get_seq_length() > out.shape[1]
        return
    out = greedy(model, text, past_key_values=cache, max_new_tokens=5, prefill_chunk_size=7)
    assert cache.get_seq_length() == out.shape[1] - 1
    remove(model)


def test_deepcopy_shares_a_prefix(model, policy):
    prefix, cache = tokens(1, 37), NAMMCache(model, policy)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    kept = positions(cache.layers[1])
    for seed in (1, 2):
        text = torch.cat([prefix, tokens(1, 20, seed=seed)], dim=1)
        twin = copy.deepcopy(cache)
        assert twin.policy is cache.policy
        got = greedy(model, text, past_key_values=twin)
        want = greedy(model, text, past_key_values=NAMMCache(model, policy))
        assert torch.equal(got, want)
    assert positions(cache.layers[1]) == kept
    assert cache.get_seq_length() == 37
    remove(model)


def test_reset_starts_again(model, policy):
    cache = NAMMCache(model, policy)
    greedy(model, tokens(2, 30), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.session.ledger.kv == cache.session.ledger.memory == 0
    ids = tokens(1, 41)
    got = greedy(model, ids, past_key_values=cache)
    assert torch.equal(got, greedy(model, ids, past_key_values=NAMMCache(model, policy)))
    remove(model)


@torch.no_grad()
def test_reset_forgets_padding(model, policy):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    cache = NAMMCache(model, policy)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids, past_key_values=NAMMCache(model, policy)).logits)
    remove(model)


ROWS = {
    "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda c: c.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_rows_take_everything_along(model, policy, name):
    """Clocks, padding and parameter vectors move with the rows they belong to."""
    change, rows = ROWS[name]
    bank = policy.with_params(torch.stack([policy.params, -policy.params, 2 * policy.params]))
    ids = tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :20] = 0, 0
    cache = NAMMCache(model, bank, param_index=[0, 1, 2])
    fresh = NAMMCache(model, bank, param_index=rows)
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
    change(cache)
    ids, mask = ids[rows], mask[rows]
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=fresh)
    got, want = (
        model(ids[:, 30:], attention_mask=mask, past_key_values=c).logits for c in (cache, fresh)
    )
    torch.testing.assert_close(got, want)
    assert cache.layers[0].kv.seen == fresh.layers[0].kv.seen
    for row in range(len(rows)):
        assert [positions(x, row) for x in cache.layers] == [
            positions(x, row) for x in fresh.layers
        ]
    remove(model)


# Crop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 5, 9, 21, 37])
def test_crop_is_exact(model, policy, removed):
    ids = tokens(2, 73)
    cache = NAMMCache(model, policy)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 73 - removed
        fresh = NAMMCache(model, policy)
        model(ids[:, : 73 - removed], past_key_values=fresh)
        assert [positions(x) for x in cache.layers] == [positions(x) for x in fresh.layers]
        assert cache.session.ledger.kv == fresh.session.ledger.kv
        assert cache.session.ledger.memory == fresh.session.ledger.memory
        for layer in cache.layers:
            layer.record_past = False
        more = tokens(2, 40, seed=9)
        a = model(more, past_key_values=cache).logits
        b = model(more, past_key_values=fresh).logits
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    remove(model)


def test_crop_of_padded_rows(model, policy):
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    cache, fresh = (NAMMCache(model, policy) for _ in range(2))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(36)  # the length to keep, as before transformers 5.16
        model(ids[:, :36], attention_mask=mask[:, :36], past_key_values=fresh)
        assert cache.layers[0].kv.seen == fresh.layers[0].kv.seen == (23, 36)
        assert [positions(x, 0) for x in cache.layers] == [positions(x, 0) for x in fresh.layers]
        both = [model(ids[:, 36:], attention_mask=mask, past_key_values=c).logits
                for c in (cache, fresh)]  # fmt: skip
    torch.testing.assert_close(*both)
    remove(model)


def test_crop_across_an_update_needs_the_past(model, policy):
    cache = NAMMCache(model, policy)
    with torch.no_grad():
        model(tokens(1, 40), past_key_values=cache)
    held = positions(cache.layers[0])
    with pytest.raises(RuntimeError, match=r"cannot undo the memory update of layer 0 .* 9 tokens"):
        cache.crop(-9)
    assert positions(cache.layers[0]) == held
    assert cache.get_seq_length() == 40
    with pytest.raises(ValueError, match="cannot remove 41 tokens, the cache has seen 40"):
        cache.crop(-41)
    remove(model)
