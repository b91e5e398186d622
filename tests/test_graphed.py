"""Decoding as a graph: the logits, the memory and the books of decoding token by token."""

from __future__ import annotations

import functools

import namm_ext
import pytest
import torch
from hf_models import COMMON, build, evicting_policy, gemma3_config, positions, tokens
from hybrid_models import build_hybrid
from namm_ext import NAMMCache, baselines
from namm_ext.cache import layer, session
from recorded_graph import RecordedGraph
from transformers import LlamaConfig

N_UP, PROMPT, STEPS = 16, 20, 45


@pytest.fixture(autouse=True)
def device(monkeypatch):
    for module in (layer, session):
        monkeypatch.setattr(module, "waits", lambda device: True)


@pytest.fixture(scope="module")
def model():
    return build(LlamaConfig(**COMMON))


class Recorder:
    """Makes graphs and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self):
        self.graphs.append(RecordedGraph())
        return self.graphs[-1]


def prompt(model, policy, rows=1, padding=0):
    """A cache that has read a prompt, its mask, and the tokens that come."""
    ids = tokens(rows, PROMPT + STEPS)
    mask = torch.ones(rows, PROMPT, dtype=torch.long)
    mask[1:, :padding] = 0
    cache = NAMMCache(model, policy)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids[:, :PROMPT], attention_mask=mask, position_ids=places, past_key_values=cache)
    return cache, mask, ids[:, PROMPT:]


def eager(model, cache, mask, ids):
    """Logits of the tokens one by one."""
    logits = []
    for t in range(ids.shape[1]):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        places = mask.sum(dim=1, keepdim=True) - 1
        out = model(
            ids[:, t : t + 1], attention_mask=mask, position_ids=places, past_key_values=cache
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def state(cache):
    rows = range(cache.memory_layers[0].kv.batch_size)
    return [
        ([positions(x, row) for row in rows], x.kv.seen, x.kv.num_updates, x.padded)
        for x in cache.memory_layers
    ], cache.get_seq_length()


POLICIES = {
    "namm": lambda: evicting_policy(N_UP, budget=8),
    "keydiff": lambda: baselines.KeyDiff(8, n_up=N_UP),
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_the_logits_and_the_memory_are_those_of_decoding(name, padding, model):
    policy = POLICIES[name]()
    cache, mask, ids = prompt(model, policy, 2, padding)
    want = eager(model, cache, mask, ids)
    other, _, _ = prompt(model, policy, 2, padding)
    recorder = Recorder()
    step = namm_ext.graphed(model, other, make_graph=recorder)
    got = torch.stack([step(ids[:, t : t + 1]).clone() for t in range(STEPS)])
    assert torch.equal(got, want)
    assert state(other) == state(cache)
    for a, b in zip(other.memory_layers, cache.memory_layers, strict=True):
        assert torch.equal(a.kv.store.segments.seqused_k, b.kv.store.segments.seqused_k)
        assert torch.equal(a.kv.q_window, b.kv.q_window)
    # The cache goes on in any other way.
    more = tokens(2, 9, seed=1)
    mask = torch.cat([mask, mask.new_ones(2, STEPS + 9)], dim=1)
    a, b = (model(more, attention_mask=mask, past_key_values=each) for each in (cache, other))
    assert torch.equal(a.logits, b.logits)


@torch.no_grad()
def test_latents():
    model, policy = build_hybrid("minicpm3", torch.float32), POLICIES["namm"]()
    cache, mask, ids = prompt(model, policy, 2)
    want = eager(model, cache, mask, ids)
    other, _, _ = prompt(model, policy, 2)
    step = namm_ext.graphed(model, other, make_graph=Recorder())
    for t, logits in enumerate(want):
        assert torch.equal(step(ids[:, t : t + 1]), logits)
    assert state(other) == state(cache)


@torch.no_grad()
def test_one_capture_for_all_tokens_between_two_updates(model, monkeypatch):
    calls = []
    forward = type(model).forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    cache, _, ids = prompt(model, POLICIES["namm"]())
    calls.clear()
    recorder = Recorder()
    step = namm_ext.graphed(model, cache, make_graph=recorder)
    places, seen = [], []
    for t in range(STEPS):
        before = len(calls)
        logits = step(ids[:, t : t + 1])
        seen.append(len(calls) - before)
        places.append(logits.data_ptr())
    # Tokens 21 (the first), 22 (captured), 32 (update), 33 (captured), ...
    ran = {t - PROMPT - 1 for t in (21, 22, 32, 33, 48, 49, 64, 65)}
    assert [t for t, n in enumerate(seen) if n] == sorted(ran)
    assert len(recorder.graphs) == 4
    assert len({len(graph.ops) for graph in recorder.graphs}) == 1
    # Between two updates the result is at one place.
    for begin, end in ((1, 11), (12, 27), (28, 43)):
        assert len(set(places[begin:end])) == 1
    # And what a capture at another token of the same period works on, too.
    store = cache.memory_layers[0].kv.store.segments
    assert {t.data_ptr() for t in store} <= set(recorder.graphs[-1].memory)


@torch.no_grad()
def test_whatever_else_works_on_the_cache_is_noticed(model):
    policy = POLICIES["namm"]()
    cache, mask, ids = prompt(model, policy)
    other, _, _ = prompt(model, policy)
    recorder = Recorder()
    step = namm_ext.graphed(model, other, make_graph=recorder)
    for t in range(4):
        step(ids[:, t : t + 1])
    eager(model, cache, mask, ids[:, :4])
    assert len(recorder.graphs) == 1
    for each in (cache, other):  # the same length and tokens, in other tensors
        each.crop(-2)
        model(ids[:, 7:9], attention_mask=torch.ones(1, PROMPT + 4), past_key_values=each)
    mask = torch.ones(1, PROMPT + 4, dtype=torch.long)
    want = eager(model, cache, mask, ids[:, 4:7])
    got = torch.stack([step(ids[:, t : t + 1]).clone() for t in range(4, 7)])
    assert torch.equal(got, want)
    assert len(recorder.graphs) == 2
    assert state(other) == state(cache)


@torch.no_grad()
def test_what_it_refuses(model):
    policy = POLICIES["namm"]()
    with pytest.raises(ValueError, match="graphed: the cache must have read a prompt"):
        namm_ext.graphed(model, NAMMCache(model, policy))(tokens(1, 1))
    cache, _, ids = prompt(model, policy, 2)
    with pytest.raises(ValueError, match=r"graphed: ids must be \[2, 1\], got \[2, 3\]"):
        namm_ext.graphed(model, cache)(ids[:, :3])
    hybrid = build(gemma3_config())
    with pytest.raises(ValueError, match="graphed: every layer of the model must have a memory"):
        namm_ext.graphed(hybrid, NAMMCache(hybrid, policy))
