"""A call that fails leaves the cache as it was, or a cache that refuses everything until reset."""

from __future__ import annotations

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, gemma3_config, positions, tokens
from hybrid_models import build_hybrid
from injection import AroundParts, AtLines, Interrupt
from namm_ext import NAMM, NAMMCache
from namm_ext.policy import Gate

#: Columns where calls end: a prompt with an update, steps over an update, a chunk over one.
ENDS = (0, 20, 31, 32, 33, 50)
PAD = 7


class Sequence:
    """A text that comes in several calls, with what they return and leave when nothing fails."""

    def __init__(self, kind):
        config = gemma3_config() if kind == "hybrid" else FAMILIES["llama"]()
        recurrent = kind == "recurrent"
        self.model = build_hybrid("lfm2") if recurrent else build(config, torch.float64)
        self.policy = evicting_policy(budget=10)
        if kind == "gated":
            self.policy = gated(self.policy, self.model.config)
        rows = 2 if kind == "padded" else 1
        self.ids = tokens(rows, ENDS[-1])
        self.mask = torch.ones_like(self.ids)
        if kind == "padded":
            self.mask[0, :PAD] = 0
        self.recording = kind == "recording"
        cache = self.cache()
        self.want = [self.call(cache, i) for i in range(len(ENDS) - 1)]
        self.end = self.state(cache)

    def cache(self):
        cache = NAMMCache(self.model, self.policy)
        if self.recording:
            cache.activate_past_recording()
        return cache

    @torch.no_grad()
    def call(self, cache, i):
        a, b = ENDS[i], ENDS[i + 1]
        mask = self.mask[:, :b]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, a:b]
        return self.model(
            self.ids[:, a:b], attention_mask=mask, position_ids=position_ids, past_key_values=cache
        ).logits

    def state(self, cache):
        lengths = [layer.cumulative_length for layer in cache.sliding_layers]
        held = [positions(x, r) for x in cache.memory_layers for r in range(self.ids.shape[0])]
        return held, lengths, [x.kv.seen for x in cache.memory_layers], cache.get_seq_length()

    def finish(self, cache, first):
        for i in range(first, len(ENDS) - 1):
            torch.testing.assert_close(self.call(cache, i), self.want[i], atol=1e-9, rtol=0)
        assert self.state(cache) == self.end


def gated(policy, config):
    """With a gate, whose numbers an update writes into the store itself."""
    generator = torch.Generator().manual_seed(0)
    heads, size = config.num_key_value_heads, 2 * config.head_dim + 2
    weight = torch.randn(config.num_hidden_layers, heads, heads * size, generator=generator)
    gate = Gate(weight, torch.zeros(weight.shape[:2]), config.head_dim)
    return NAMM(
        policy.config, policy.params, policy.mean, policy.var, budget=policy.budget, gate=gate
    )


KINDS = ("plain", "hybrid", "recurrent", "padded", "recording", "gated")
#: A call fails at one of so many points: by default, and in the slow test.
PLACES = {"parts": (AroundParts, 9, 1), "lines": (AtLines, 97, 11)}


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_fails_the_next_call_is_right_or_refused(kind, places, dense, monkeypatch):
    sequence = Sequence(kind)
    make, few, many = PLACES[places]
    injector = make(monkeypatch, sequence.model)
    cache = sequence.cache()
    for i in range(len(ENDS) - 1):
        injector.run(sequence.call, cache, i)
    points = injector.points()
    assert len(points) > 80
    right = refused = 0
    for point in points[:: many if dense else few]:
        cache = sequence.cache()
        injector.count, injector.at = 0, point
        for i in range(len(ENDS) - 1):
            before = [layer.kv and layer.kv.num_updates for layer in cache.memory_layers]
            try:
                injector.run(sequence.call, cache, i)
            except Interrupt:
                break
        else:
            pytest.fail("nothing failed")
        injector.at = None
        updated = [layer.kv and layer.kv.num_updates for layer in cache.memory_layers] != before
        if cache.get_seq_length() == ENDS[i + 1]:  # every layer has the tokens: the call counts
            sequence.finish(cache, i + 1)
            continue
        assert cache.get_seq_length() == ENDS[i]
        try:
            again = sequence.call(cache, i)
        except ValueError as error:
            refused += 1
            if "cache.reset()" not in str(error):
                raise
            assert updated or kind in ("hybrid", "recurrent") or places == "lines"
            check_refused(sequence, cache, i)
            cache.reset()
            if sequence.recording:
                cache.activate_past_recording()
            sequence.finish(cache, 0)
        else:
            right += 1
            torch.testing.assert_close(again, sequence.want[i], atol=1e-9, rtol=0)
            sequence.finish(cache, i + 1)
    assert right > 0.4 * (right + refused), (right, refused)
    assert right + refused > 10


def check_refused(sequence, cache, i):
    """Everything, and again."""
    for action in (
        lambda: sequence.call(cache, i),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.zeros(1, dtype=torch.long)),
        lambda: cache.save("never"),
        lambda: sequence.call(cache, i),
    ):
        with pytest.raises(ValueError, match=r"cache\.reset\(\)"):
            action()
