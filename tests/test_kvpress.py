"""kvpress both ways: what a press would keep, our store keeps; what a policy keeps, our press does.

`make kvpress-check` gets kvpress and runs these.
"""

from __future__ import annotations

import pytest
import torch

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")

from hf_models import FAMILIES, build, evicting_policy, positions, tokens  # noqa: E402
from namm_ext import Budget, NAMMCache  # noqa: E402
from namm_ext.baselines import KeyDiff, StreamingLLM  # noqa: E402
from namm_ext.integrations.kvpress import NAMMPress, PressPolicy  # noqa: E402
from transformers import DynamicCache  # noqa: E402

T, KEPT = 128, 32
PRESSES = {
    "KNorm": kvpress.KnormPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "SnapKV": lambda: kvpress.SnapKVPress(window_size=16),
    "TOVA": kvpress.TOVAPress,
    "LagKV": lambda: kvpress.LagKVPress(lag_size=16),
}


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


@torch.no_grad()
def scores_of(model, press, ids):
    """``[H, T]`` scores that a press gives a prompt, for every layer."""
    cache, given = DynamicCache(), {}
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, _, kwargs, __: given.update({module.layer_idx: (module, kwargs)}),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    model(ids, cache=cache)
    for hook in hooks:
        hook.remove()
    scores = []
    for index, (module, kwargs) in sorted(given.items()):
        layer = cache.layers[index]
        own = (layer.keys, layer.values, None, kwargs)
        scores.append(press.score(module, kwargs["hidden_states"], *own)[0])
    return scores


@pytest.mark.parametrize("name", PRESSES)
@torch.no_grad()
def test_our_store_keeps_what_the_press_would(model, name):
    ids = tokens(1, T)
    scores = scores_of(model, PRESSES[name](), ids)
    policy = PressPolicy(PRESSES[name](), Budget(KEPT, protect_newest=False), n_up=T)
    cache = NAMMCache(model, policy)
    model(ids, cache=cache)
    for layer, wanted in zip(cache.layers, scores, strict=True):
        for kept, score in zip(positions(layer), wanted, strict=True):
            # LagKV scores by rank, so that many are alike.
            best = score.topk(KEPT).values.sort().values
            torch.testing.assert_close(score[kept].sort().values, best)


@torch.no_grad()
def test_presses_take_every_budget_and_go_on(model):
    """KeyDiff is ours too: heads that hold different numbers, many updates, two rows."""
    budget = Budget(16, scope="per_layer", sink_tokens=2)
    ids = tokens(2, 100)
    found = []
    for policy in (PressPolicy(kvpress.KeyDiffPress(), budget, 16), KeyDiff(budget, 16)):
        cache = NAMMCache(model, policy)
        model(ids, cache=cache)
        found.append([positions(layer, row) for layer in cache.layers for row in (0, 1)])
    assert found[0] == found[1]
    assert len({len(head) for head in found[0][0]}) > 1


@torch.no_grad()
def test_nothing_is_asked_while_all_fits(model):
    press = kvpress.SnapKVPress(window_size=16)
    policy = PressPolicy(press, 48, n_up=16)
    cache = NAMMCache(model, policy)
    model(tokens(1, 16), cache=cache)  # no more than the window: the press would fail
    model(tokens(1, 64), cache=cache)
    assert {len(head) for head in positions(cache.layers[0])} == {48}


@pytest.mark.parametrize(("press", "message"), [
    (kvpress.ExpectedAttentionPress(), "ExpectedAttentionPress does not"),
    (kvpress.ObservedAttentionPress(), "the attention of a whole prompt, as Observed"),
    (kvpress.SnapKVPress(window_size=65), "window_size must be at most n_up = 64, got 65"),
    ("SnapKV", "press must be a ScorerPress of kvpress, got str"),
])  # fmt: skip
def test_presses_that_want_more_are_refused(press, message):
    with pytest.raises(ValueError, match=message):
        PressPolicy(press, 0.25)


def test_a_press_has_a_fingerprint():
    one, other = (PressPolicy(kvpress.SnapKVPress(window_size=w), 0.25) for w in (16, 32))
    assert one.fingerprint() != other.fingerprint()
    assert one.to_dict()["press"]["class"] == "SnapKVPress"


@pytest.mark.parametrize("policy", [
    evicting_policy(16, seed=3, budget=Budget(24)), KeyDiff(24, n_up=16),
], ids=["namm", "keydiff"])  # fmt: skip
@torch.no_grad()
def test_our_press_keeps_what_a_memory_does(model, policy):
    """In the first layer, which reads the same with both."""
    ids = tokens(1, 100)
    memory = NAMMCache(model, policy)
    want = model(ids, cache=memory).logits
    del want
    cache, stock = DynamicCache(), DynamicCache()
    logits = model(ids, cache=stock).logits
    with NAMMPress(policy)(model):
        torch.testing.assert_close(model(ids, cache=cache).logits, logits)
        kept = positions(memory.layers[0])
        for head, places in enumerate(kept):
            torch.testing.assert_close(
                cache.layers[0].keys[0, head], stock.layers[0].keys[0, head, places]
            )
        assert {layer.keys.shape[2] for layer in cache.layers} == {24 + 100 % 16}
        model(ids[:, :1], cache=cache)  # decoding only appends
    assert cache.layers[0].keys.shape[2] == 24 + 100 % 16 + 1
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("budget", [
    Budget(), Budget(9, threshold=0.0), Budget(9, scope="per_layer"),
])  # fmt: skip
def test_budgets_that_a_press_cannot_keep(budget):
    with pytest.raises(ValueError, match="policy must have a budget with a size"):
        NAMMPress(StreamingLLM(9).with_budget(budget))


@torch.no_grad()
def test_a_press_reads_one_row(model):
    with (
        NAMMPress(KeyDiff(24, n_up=16))(model),
        pytest.raises(ValueError, match="a batch must have one row, got 2"),
    ):
        model(tokens(2, 40), cache=DynamicCache())
