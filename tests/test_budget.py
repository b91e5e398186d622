"""Budget: what it refuses, and that every policy keeps exactly what it says."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math

import pytest
import torch
from hf_models import FAMILIES, build, positions, tokens
from namm_ext import NAMM, Budget, Calibration, NAMMCache, NAMMConfig, baselines, budget
from namm_ext.baselines import H2O, TOVA, KNorm, NeverEvict, Random, SnapKV, StreamingLLM
from small_context import context, kept_positions

CHANGED = {
    "size": 77, "scope": "per_layer", "layer_shares": (0.5, 1.5), "sink_tokens": 4,
    "recent_tokens": 0.5, "threshold": -0.5,
}  # fmt: skip
RULES = [getattr(baselines, name) for name in baselines.__all__ if name not in ("Baseline", "Full")]


def test_docstring_examples():
    result = doctest.testmod(budget)
    assert result.attempted > 4
    assert result.failed == 0


@pytest.mark.parametrize(
    "values", [{}, CHANGED, {"selection": "original"}, {"size": 0.5}, {"size": "2 GiB"}]
)
def test_round_trips(values):
    changed = Budget(**values)
    assert Budget.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert eval(repr(changed)) == changed
    assert hash(changed) == hash(Budget(**values))
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.size = 3  # type: ignore[misc]


SIZE = (
    "size must be an int of at least 1 (tokens per head), a float in (0, 1] (the share to keep, "
    "1 - compression ratio), bytes such as '2 GiB', or None, got "
)
BAD = [
    ({"size": 0}, SIZE + "0"),
    ({"size": True}, SIZE + "True"),
    ({"size": 0.0}, SIZE + "0.0"),
    ({"size": 256.0}, SIZE + "256.0"),
    ({"size": "2 Gibi"}, SIZE + "'2 Gibi'"),
    ({"size": "0 GiB"}, SIZE + "'0 GiB'"),
    ({"size": math.nan}, SIZE + "nan"),
    ({"scope": "all"}, "scope must be 'per_head' or 'per_layer' or 'global', got 'all'"),
    ({"selection": "topk"}, "selection must be 'ragged' or 'original', got 'topk'"),
    (
        {"layer_shares": (1.0, 2.0), "size": 9},
        "layer_shares must be positive numbers with mean 1, one per layer, got (1.0, 2.0)",
    ),
    ({"size": 2**31}, f"size must be at most {2**31 - 1}, as positions are int32, got {2**31}"),
    ({"sink_tokens": 2**40}, f"sink_tokens must be at most {2**31 - 1}, as positions are int32, "
     f"got {2**40}"),
    ({"sink_tokens": -1}, "sink_tokens must be an int of at least 0, got -1"),
    ({"recent_tokens": 1.5}, "recent_tokens must be an int of at least 0 or a float in [0, 1], "
     "got 1.5"),
    ({"threshold": math.nan}, "threshold must be a finite number or None, got nan"),
    ({"protect_newest": 1}, "protect_newest must be a bool, got 1"),
    ({"scope": "per_layer"}, "size must be a number with scope 'per_layer', got None"),
    ({"scope": "global"}, "size must be a number with scope 'global', got None"),
    ({"layer_shares": (1.0,)}, "size must be a number with layer_shares, got None"),
    (
        {"size": 9, "scope": "global", "layer_shares": (1.0,)},
        "layer_shares must be None with scope 'global', got (1.0,)",
    ),
    (
        {"size": 9, "scope": "per_layer", "selection": "original"},
        "scope must be 'per_head' with selection 'original', got 'per_layer'",
    ),
    (
        {"protect_newest": False},
        "protect_newest must be True unless threshold is None, size is set and scope is "
        "'per_head', got False",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_values(values, message):
    with pytest.raises(ValueError) as error:
        Budget(**values)
    assert str(error.value) == f"Budget: {message}"


def test_unknown_key():
    with pytest.raises(ValueError, match=r"Budget: keys must be among size, .*, got cache_size"):
        Budget.from_dict({"cache_size": 3})


@pytest.mark.parametrize(("values", "num_tokens", "floors"), [
    ({"sink_tokens": 4, "recent_tokens": 3}, 9, (4, 3)),
    ({"sink_tokens": 4, "recent_tokens": 7}, 9, (4, 5)),
    ({"sink_tokens": 4, "recent_tokens": 7}, 3, (3, 0)),
    ({"recent_tokens": 0.5}, 9, (0, 4)),
    ({"sink_tokens": 2, "recent_tokens": 1.0}, 9, (2, 7)),
    ({"recent_tokens": 0.7}, 10, (0, 7)),  # 0.7 * 10 is less than 7 in binary
])  # fmt: skip
def test_floors_follow_one_rule(values, num_tokens, floors):
    assert Budget(**values).floors(num_tokens) == floors


def test_share_of_a_context():
    assert Budget(0.25, sink_tokens=4).of_context(1023) == Budget(255, sink_tokens=4)
    assert Budget(0.001).of_context(100) == Budget(1)
    assert Budget(7).of_context(100) == Budget(7)


# Selecting ----------------------------------------------------------------------------------------


def kept(policy, scores, ctx) -> list[list[int]]:
    return kept_positions(policy.select(scores, ctx)[0], ctx)


def num_kept(ctx, scores, *size, **fields) -> list[int]:
    namm = NAMM(NAMMConfig(n_up=16), budget=Budget(*size, **fields))
    return namm.select(scores, ctx)[1].tolist()


def test_select_follows_the_budget():
    ctx = context(due=(True,))
    scores = torch.full((86,), -1.0)
    scores[:10], scores[43:48] = 2.0, 1.0  # 10 and 5 wanted tokens
    assert num_kept(ctx, scores, threshold=0.0) == [11, 6]
    assert num_kept(ctx, scores, threshold=0.0, selection="original") == [11, 11]
    assert num_kept(ctx, scores, threshold=1.5) == [11, 1]
    assert num_kept(ctx, scores, 4, threshold=1.5) == [4, 1]
    assert num_kept(ctx, scores) == [40, 40]
    assert num_kept(ctx, scores, 7) == [7, 7]
    assert num_kept(ctx, scores, 7, scope="per_layer") == [11, 3]
    assert num_kept(ctx, scores, 9, threshold=0.0) == [9, 6]
    assert num_kept(ctx, scores, threshold=0.0, sink_tokens=20, recent_tokens=3) == [18, 18]
    assert num_kept(ctx, scores, 0.2) == [9, 9]  # of 45 seen
    namm = NAMM(NAMMConfig(n_up=16), budget=Budget(2, protect_newest=False))
    assert kept(namm, scores, ctx)[0] == [13, 14]


def test_layer_shares_divide_the_budget():
    policy = KNorm(Budget(9, layer_shares=(0.5, 1.5), sink_tokens=4, recent_tokens=0.5))
    scores = torch.randn(172, generator=torch.Generator().manual_seed(0))
    for layer_idx, size in enumerate((4, 13)):
        ctx = context(layer_idx=layer_idx)
        assert policy.select(scores, ctx)[1].tolist() == [size, size, 40, 40]
    with pytest.raises(ValueError, match="an entry for every layer, got 2 entries and layer 2"):
        policy.select(scores, context(layer_idx=2))


def small_calibration(**changes) -> Calibration:
    tensors = {
        "offsets": torch.tensor([[0.0, 1.0], [0.5, -0.5]]),
        "fractions": torch.tensor([0.25, 0.5, 1.0]),
        "layer_fractions": torch.tensor([[0.1, 0.3, 1.0], [0.4, 0.7, 1.0]]),
    }
    return Calibration(**{**tensors, **changes})


BUDGETS = {
    "share": Budget(0.3),
    "shared_share": Budget(0.3, scope="per_layer", recent_tokens=0.25),
    "threshold": Budget(threshold=0.5, recent_tokens=0.125),
    "global": Budget(20, scope="global", sink_tokens=2),
    "global_share": Budget(0.3, scope="global", threshold=-0.5),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_rows_do_not_depend_on_each_other(name):
    """Rows that have seen different numbers of tokens, some not due, equal each row alone."""
    policy = KNorm(BUDGETS[name]).with_calibration(small_calibration())
    due, seen = (True, True, False, True, True), (64, 160, 96, 64, 48)
    ctx = context(due=due, seen=seen, layer_idx=1)
    scores = torch.randn(430, generator=torch.Generator().manual_seed(0))
    together, counts = policy.select(scores, ctx)
    sizes = set()
    for b, (is_due, n) in enumerate(zip(due, seen, strict=True)):
        alone = context(due=(is_due,), seen=(n,), layer_idx=1)
        keep, num = policy.select(scores[86 * b : 86 * (b + 1)], alone)
        assert kept_positions(keep, alone) == kept_positions(together, ctx)[2 * b : 2 * (b + 1)]
        assert torch.equal(counts[2 * b : 2 * (b + 1)], num)
        sizes.add(int(num.sum()))
    assert len(sizes) > 2
    scores[3] = math.nan
    again = policy.select(scores, ctx)[1]
    assert again[0] == -1
    assert torch.equal(again[2:], counts[2:])


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


@pytest.mark.parametrize("name", BUDGETS)
@torch.no_grad()
def test_chunks_and_padding_change_nothing(model, name):
    policy = Random(BUDGETS[name], n_up=16).with_calibration(small_calibration())
    ids = tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    whole, pieces, alone = (NAMMCache(model, policy) for _ in range(3))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": position_ids}
    model(ids, **given, past_key_values=whole)
    for start, stop in ((0, 30), (30, 31), (31, 75)):
        part = {"attention_mask": mask[:, :stop], "position_ids": position_ids[:, start:stop]}
        model(ids[:, start:stop], **part, past_key_values=pieces)
    model(ids[:1, 23:], past_key_values=alone)
    for a, b, c in zip(whole.layers, pieces.layers, alone.layers, strict=True):
        assert [positions(a, row) for row in (0, 1)] == [positions(b, row) for row in (0, 1)]
        assert positions(a) == positions(c)
        assert max(len(p) for p in positions(a, 1)) < 75


@torch.no_grad()
def test_global_budget_is_exact(model):
    """After each update the layers hold their parts, and together what the budget says."""
    policy = KNorm(Budget(20, scope="global"), n_up=16).with_calibration(small_calibration())
    cache = NAMMCache(model, policy)
    model(tokens(1, 160), past_key_values=cache)
    counts = [sum(layer.kv.store.kept) for layer in cache.layers]
    # 20 of 160 is a fraction of 1/8: half of the first columns, 0.05 and 0.2.
    assert counts == [2 * 8, 2 * 32]
    assert sum(counts) == 2 * 2 * 20


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scope", ["per_head", "per_layer", "global"])
def test_a_budget_in_bytes_is_met(model, scope, rows):
    """By all that is allocated after an update; another token in every head would be too much."""
    policy = H2O(Budget("40 kB", scope=scope), n_up=16).with_calibration(small_calibration())
    cache = NAMMCache(model, policy)
    model(tokens(rows, 160), past_key_values=cache)
    report = cache.report()
    assert report.tokens_kept < report.tokens_seen / 2
    per_token = 2 * 2 * (2 * 8 * 4 + 4 + 4)  # layers, heads; k, v, pos, state
    used = (report.kv_bytes + report.memory_bytes) / rows
    # Where layers differ each may be a token short.
    assert 40_000 - (2 if scope == "per_head" else 3) * per_token < used <= 40_000
    model(tokens(rows, 160), past_key_values=cache)
    report = cache.report()
    assert report.kv_bytes + report.memory_bytes <= rows * 40_000


def test_a_budget_in_bytes_goes_on_from_a_file(model, tmp_path):
    policy = H2O(Budget("40 kB"), n_up=16)
    cache = NAMMCache(model, policy)
    model(tokens(1, 100), past_key_values=cache)
    cache.save(tmp_path / "memory")
    again = NAMMCache.load(tmp_path / "memory", model, policy)
    for one in (cache, again):
        model(tokens(1, 60), past_key_values=one)
    assert again.report().tokens_kept == cache.report().tokens_kept


def test_bytes_that_hold_nothing_are_refused(model):
    with pytest.raises(
        ValueError, match=r"size must be at least \d+ bytes for this model, got '2 k"
    ):
        model(tokens(1, 20), past_key_values=NAMMCache(model, KNorm(Budget("2 kB"), n_up=16)))
    with pytest.raises(ValueError, match="size in bytes needs a NAMMCache, got '2 GiB' without"):
        KNorm(Budget("2 GiB")).room(0, 100)


def test_a_compression_ratio_is_the_complement():
    message = r"size the one that stays: Budget\(0.25\) for a ratio of 0.75, got 0.5"
    for make in (Budget, KNorm(9).with_budget):
        with pytest.raises(TypeError, match=message):
            make(compression_ratio=0.5)


def test_forgetting_can_be_turned_off(model):
    policy = KNorm(Budget(8), n_up=16)
    cache = NAMMCache(model, policy)
    model(tokens(1, 48), past_key_values=cache)
    cache.evicts = False
    model(tokens(1, 48), past_key_values=cache)
    assert {n for layer in cache.layers for n in layer.kv.store.kept} == {8 + 48}
    cache.evicts = True
    model(tokens(1, 16), past_key_values=cache)
    assert {n for layer in cache.layers for n in layer.kv.store.kept} == {8}


# Every policy and every budget --------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["per_head", "per_layer", "global"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_takes_every_budget(rule, scope):
    wanted = Budget(9, scope=scope, sink_tokens=2)
    policy = rule(n_up=16) if rule is NeverEvict else rule(5, n_up=16)
    other = policy.with_budget(wanted).with_calibration(small_calibration())
    assert policy.budget != wanted
    scores = torch.randn(172, generator=torch.Generator().manual_seed(0))
    counts = other.select(scores, context(layer_idx=0))[1].tolist()
    # 9 of 45 seen are 0.2 of them; this layer then keeps 0.08.
    total = {"per_head": 18, "per_layer": 18, "global": 6}[scope]
    assert sum(counts[:2]) == (80 if rule is NeverEvict else total)
    assert counts[2:] == [40, 40]
    again = eval(repr(other), {**vars(baselines), "Budget": Budget})
    assert again.with_calibration(other.calibration).fingerprint() == other.fingerprint()
    assert again.settings() == other.settings()


def test_a_bare_size_is_the_published_rule():
    assert StreamingLLM(256).budget == Budget(256, sink_tokens=4)
    assert H2O(0.5).budget == Budget(0.5, recent_tokens=0.5)
    assert H2O(Budget(256)).budget == Budget(256)
    assert NAMM(NAMMConfig()).budget == Budget(threshold=0.0)
    assert NAMM(NAMMConfig(), budget=256).budget == Budget(256)


def test_with_budget_changes_fields():
    policy = SnapKV(Budget(14, sink_tokens=1), 16, window=5)
    assert policy.with_budget(size=20, scope="per_layer").budget == Budget(
        20, scope="per_layer", sink_tokens=1
    )
    assert policy.budget == Budget(14, sink_tokens=1)
    # The observation window stays whatever the budget says, if there is room.
    assert policy.with_budget(Budget(9)).room(0, 100) == (9, 0, 5)
    assert policy.with_budget(Budget(3, sink_tokens=1)).room(0, 100) == (3, 1, 2)
    with pytest.raises(ValueError, match="Budget: size must be"):
        policy.with_budget(size=0)


def test_who_couples_heads():
    namm = NAMM(NAMMConfig())
    assert not namm.couples_heads
    assert not namm.with_budget(size=9, threshold=None).couples_heads
    assert namm.with_budget(Budget(9, scope="per_layer")).couples_heads
    assert namm.with_budget(Budget(9, scope="global")).couples_heads
    assert namm.with_budget(selection="original").couples_heads
    assert TOVA(9).couples_heads
    assert not TOVA(9, heads="head").couples_heads
