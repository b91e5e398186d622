"""select against the reference: equal decisions, whatever the mode."""

import itertools
import math

import pytest
import torch
from namm_ext import ops, reference, testing

DEFAULTS = {
    "threshold": 0.0,
    "cache_size": -1,
    "budget": "per_head",
    "fill": False,
    "protect_newest": True,
    "sink_tokens": 0,
    "recent_tokens": 0,
}
MODES = {
    "ragged": {},
    "reference": {"fill": True},
    "reference_budget": {"fill": True, "cache_size": 9},
    "reference_all": {"fill": True, "cache_size": 10_000},
    "per_head": {"threshold": -math.inf, "cache_size": 7},
    "per_head_1": {"threshold": -math.inf, "cache_size": 1},
    "per_head_threshold": {"cache_size": 20},
    "per_layer": {"threshold": -math.inf, "cache_size": 11, "budget": "per_layer"},
    "per_layer_1": {"threshold": -math.inf, "cache_size": 1, "budget": "per_layer"},
    "per_layer_threshold": {"cache_size": 30, "budget": "per_layer"},
    "per_layer_no_budget": {"budget": "per_layer"},
    "floors": {"sink_tokens": 4, "recent_tokens": 6},
    "floors_budget": {"sink_tokens": 4, "recent_tokens": 6, "cache_size": 8},
    "floors_above_budget": {"sink_tokens": 90, "recent_tokens": 90, "cache_size": 5},
    "floors_per_layer": {"recent_tokens": 5, "cache_size": 6, "budget": "per_layer"},
    "unprotected": {"protect_newest": False, "threshold": -math.inf, "cache_size": 3},
    "nothing": {"protect_newest": False, "threshold": math.inf},
    "everything": {"threshold": -math.inf},
}
SCORES = {
    "random": lambda n, g: torch.randn(n, generator=g),
    "ties": lambda n, g: torch.randint(-1, 2, (n,), generator=g).float(),
    "zeros": lambda n, g: torch.zeros(n),
    "signed_zeros": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "infinities": lambda n, g: torch.tensor([math.inf, -math.inf, 0.0])[
        torch.randint(0, 3, (n,), generator=g)
    ],
}
LENGTHS = {**testing.LENGTHS, "long": (3000, 10, 700, 2500)}


def _case(lengths, scores="random", device="cpu", active=(True, True), seed=0):
    store = testing.ragged_store(
        LENGTHS[lengths], device=device, head_dim=1, num_state=0, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    values = SCORES[scores](store.k.shape[0], generator).to(device)
    values[~store.live] = math.nan
    return store, values, torch.tensor(active, device=device)


def _select(function, store, scores, active, **changes):
    return function(scores, store, active, **{**DEFAULTS, **changes})


def _assert_equal(store, scores, active, **changes):
    keep, num_kept = _select(ops.select, store, scores, active, **changes)
    expected = _select(reference.select, store, scores, active, **changes)
    live = store.live
    assert keep.dtype == torch.uint8
    assert num_kept.dtype == torch.int32
    assert torch.equal(num_kept, expected[1])
    assert torch.equal(keep[live], expected[0][live])
    return keep, num_kept


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_select(lengths, mode, scores, device):
    store, values, active = _case(lengths, scores, device)
    keep, num_kept = _assert_equal(store, values, active, **MODES[mode])
    changes = {**DEFAULTS, **MODES[mode]}
    used = store.seqused_k
    if changes["cache_size"] >= 0 and changes["threshold"] == -math.inf:
        # A budget without a threshold is met exactly.
        if changes["budget"] == "per_head":
            assert torch.equal(num_kept, used.clamp(max=changes["cache_size"]))
        else:
            total = used.view(2, 2).sum(1).clamp(max=2 * changes["cache_size"])
            assert torch.equal(num_kept.view(2, 2).sum(1).int(), total.int())
    if changes["protect_newest"]:
        newest = (store.cu_seqlens_k[:-1] + used - 1)[used > 0].long()
        assert bool((keep[newest] == 1).all())


@pytest.mark.parametrize("device", testing.devices())
def test_inactive_rows_keep_everything(device):
    store, values, active = _case("ragged", device=device, active=(False, True))
    _, num_kept = _assert_equal(store, values, active, threshold=math.inf)
    assert torch.equal(num_kept[:2], store.seqused_k[:2])
    assert num_kept[2:].tolist() == [1, 1]


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("mode", ["ragged", "reference", "per_head", "per_layer"])
def test_nan_scores_are_reported(mode, device):
    store, values, active = _case("ragged", device=device)
    values[int(store.cu_seqlens_k[2]) + 10] = math.nan
    _, num_kept = _select(ops.select, store, values, active, **MODES[mode])
    assert int(num_kept[2]) == -1
    expected = _select(reference.select, store, values, active, **MODES[mode])[1]
    assert torch.equal(num_kept, expected)


@pytest.mark.parametrize("device", testing.devices())
def test_newer_token_wins_a_tie(device):
    """An all-zero scorer under a budget is a recency window."""
    store, values, active = _case("equal", "zeros", device)
    keep, _ = _assert_equal(store, values, active, cache_size=5)
    for s in range(4):
        start = int(store.cu_seqlens_k[s])
        assert keep[start : start + 48].tolist() == [0] * 43 + [1] * 5


@pytest.mark.parametrize(("threads", "seed"), list(itertools.product([1, 2], range(4))))
def test_threads_do_not_matter(threads, seed):
    store, values, active = _case("long", "ties", seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mode in ("reference_budget", "per_layer", "per_head_threshold"):
            _assert_equal(store, values, active, **MODES[mode])
    finally:
        torch.set_num_threads(before)


def test_many_segments_use_threads():
    lengths = [11, 0, 500, 37] * 64
    store = testing.ragged_store(lengths, head_dim=1, num_state=0)
    values = torch.randn(store.k.shape[0])
    active = torch.ones(64, dtype=torch.bool)
    for mode in ("ragged", "reference", "per_head", "per_layer"):
        _assert_equal(store, values, active, **MODES[mode])


BAD = {
    "threshold": (math.nan, "select: threshold must not be NaN, got nan"),
    "cache_size": (0, "select: cache_size must be -1 (none) or in [1, 2147483647], got 0"),
    "budget": ("global", "select: budget must be 'per_head' or 'per_layer', got 'global'"),
    "sink_tokens": (-1, "select: sink_tokens must be in [0, 2147483647], got -1"),
    "recent_tokens": (-2, "select: recent_tokens must be in [0, 2147483647], got -2"),
}


@pytest.mark.parametrize("name", BAD)
def test_select_refuses(name):
    value, message = BAD[name]
    with pytest.raises(RuntimeError) as error:
        _select(ops.select, *_case("ragged"), **{name: value})
    assert str(error.value).endswith(message)


def test_select_refuses_fill_with_a_shared_budget():
    with pytest.raises(RuntimeError) as error:
        _select(ops.select, *_case("ragged"), fill=True, budget="per_layer")
    message = "select: fill must be False with budget 'per_layer', got True"
    assert str(error.value).endswith(message)


def test_select_float64_runs_the_reference():
    store, values, active = _case("ragged")
    got = _select(ops.select, store, values.double(), active)
    exact = _select(reference.select, store, values.double(), active)
    assert torch.equal(got[0], exact[0])
    assert torch.equal(got[1], exact[1])
