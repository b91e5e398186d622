"""The bytes of a memory: what it frees and reports, and what a failing update leaves."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, greedy, tokens
from namm_ext import NAMM, NAMMCache, NAMMConfig, remove
from namm_ext.baselines import StreamingLLM
from namm_ext.policy import Policy


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


@pytest.fixture
def policy():
    return evicting_policy(budget=10)


def cache_tensors(cache):
    for layer in cache.layers:
        kv = layer.kv
        yield from (kv.store.segments.k, kv.store.segments.v)


def test_bytes_are_freed_and_reported(model):
    cache = NAMMCache(model, StreamingLLM(10, n_up=16))
    greedy(model, tokens(2, 100), past_key_values=cache, max_new_tokens=30)
    layer = cache.layers[0]
    heads, row = 2 * 2, 2 * 8 * 8  # segments; k and v of 8 numbers in float64
    assert [t.untyped_storage().nbytes() for t in cache_tensors(cache)] == [
        heads * (10 + 16) * row // 2
    ] * 4
    report = cache.report()
    assert report.kv_bytes == 2 * heads * 26 * row
    assert report.full_bytes == 2 * heads * 129 * row
    assert report.layers[0].seen == (129, 129)
    assert report.layers[0].kept == ((10, 10), (10, 10))
    assert report.layers[0].live == ((11, 11), (11, 11))  # 129 = 8 * 16 + 1
    assert report.kv_bytes_live == 2 * heads * 11 * row
    assert report.kept_fraction == pytest.approx(10 / 128)
    assert report.kv_bytes == cache.session.ledger.kv
    assert report.memory_bytes == cache.session.ledger.memory
    # At most the old store (10 + 16), the new one next to it, and the other layer.
    assert report.peak_kv_bytes == 3 * heads * 26 * row
    old = [weakref.ref(t) for t in cache_tensors(cache)]
    gc.disable()
    try:
        del cache, layer
        assert all(ref() is None for ref in old)  # no cycle keeps the memory alive
    finally:
        gc.enable()
    remove(model)


def test_old_stores_die_at_the_update(model, policy):
    cache = NAMMCache(model, policy)
    gc.disable()
    try:
        with torch.no_grad():
            model(tokens(1, 15), past_key_values=cache)
            old = [weakref.ref(t) for t in cache_tensors(cache)]
            model(tokens(1, 1), past_key_values=cache)
        assert cache.layers[0].kv.num_updates == 1
        assert all(ref() is None for ref in old)
    finally:
        gc.enable()
    remove(model)


def test_peak_is_bounded_in_one_long_forward(model):
    cache = NAMMCache(model, StreamingLLM(8, n_up=16))
    with torch.no_grad():
        model(tokens(1, 900), past_key_values=cache)
    report = cache.report()
    assert report.layers[0].num_updates == 56
    assert report.peak_kv_bytes < 0.1 * report.full_bytes
    remove(model)


def test_report_prints_and_serialises(model, policy):
    cache = NAMMCache(model, policy)
    empty = cache.report().to_dict()
    assert empty["layers"] == []
    assert empty["totals"]["kept_fraction"] == 1.0
    greedy(model, tokens(1, 50), past_key_values=cache)
    data = cache.report().to_dict()
    assert data["policy"] == "NAMM"
    assert data["fingerprint"] == policy.fingerprint()
    assert data["totals"]["total_bytes"] == (
        data["totals"]["kv_bytes"] + data["totals"]["memory_bytes"]
    )
    text = str(cache.report())
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["layer", "seen", "kept"]
    assert len(lines) == 2 + 2 + 1 + 1 + 1
    assert "of the full cache" in lines[-1]
    remove(model)


# A failing update ---------------------------------------------------------------------------------


class Failing(Policy):
    """Fails at the n-th update, once."""

    def __init__(self, inner, at):
        self.inner, self.left, self.n_up, self.num_state = inner, at, inner.n_up, inner.num_state

    def update(self, ctx):
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no memory left")
        return self.inner.update(ctx)

    def select(self, scores, ctx):
        return self.inner.select(scores, ctx)

    def fingerprint(self):
        return self.inner.fingerprint()


def test_a_failed_prompt_leaves_the_cache_empty(model, policy):
    cache = NAMMCache(model, Failing(policy, at=3))  # layer 0 makes 2 updates, layer 1 fails
    ids = tokens(1, 40)
    with torch.no_grad(), pytest.raises(MemoryError):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        got = model(ids, past_key_values=cache).logits
        want = model(ids, past_key_values=NAMMCache(model, policy)).logits
    torch.testing.assert_close(got, want)
    remove(model)


def test_nan_scores_are_an_error(model):
    policy = NAMM(NAMMConfig(n_up=16))
    policy.params[-1] = torch.nan
    cache = NAMMCache(model, policy)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"scores must not be NaN.*layer 0.*row 0"),
    ):
        model(tokens(1, 40), past_key_values=cache)
    remove(model)


def test_who_forgets_nothing_keeps_all(model):
    cache = NAMMCache(model, NAMM(NAMMConfig(n_up=16)))
    assert cache.report().kept_fraction == 1.0
    for length in (5, 11, 13):  # before the first update, at it, behind it
        model(torch.ones(2, length, dtype=torch.int64), past_key_values=cache)
        report = cache.report()
        assert report.kept_fraction == report.live_fraction == 1.0
        assert cache.kept_fraction_per_row().tolist() == [1.0, 1.0]
    totals = report.to_dict()["totals"]
    assert totals["tokens_kept"] == totals["tokens_judged"] == totals["tokens_seen"] * 16 // 29
