"""select of the CUDA kernels, run on the CPU, against the law: equal decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor

DEFAULTS = {
    "threshold": 0.0,
    "cache_size": -1,
    "budget": "per_head",
    "fill": False,
    "protect_newest": True,
    "sink_tokens": 0,
    "recent_tokens": 0,
}


def run(
    store: values.Segments,
    scores: Tensor,
    active: Tensor,
    options: dict[str, object],
    order: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    held = store._make(emulated.guarded(t) for t in store)
    inputs = [emulated.guarded(t) for t in (scores, active.to(torch.uint8))]
    keep = emulated.guarded(torch.full((store.capacity,), 77, dtype=torch.uint8))
    num_kept = emulated.guarded(torch.full_like(store.seqused_k, -99))
    ptr = emulated.pointer
    params = emulated.SelectParams(
        emulated.segments(held, active.numel()),
        ptr(inputs[0]), ptr(held.pos), ptr(inputs[1]), ptr(keep), ptr(num_kept),
        options["threshold"], options["cache_size"],
        ("per_head", "per_layer").index(str(options["budget"])),
        options["fill"], options["protect_newest"],
        options["sink_tokens"], options["recent_tokens"],
    )  # fmt: skip
    emulated.launch("select", params, store.capacity, order=order)
    return keep, num_kept


def make_scores(store: values.Segments, kind: str) -> Tensor:
    gen = torch.Generator().manual_seed(11)
    n = store.capacity
    scores = {
        "normal": lambda: torch.randn(n, generator=gen),
        "ties": lambda: torch.randint(-2, 3, (n,), generator=gen) * 0.5,
        "zeros": lambda: torch.where(torch.rand(n, generator=gen) < 0.5, 0.0, -0.0),
        "wide": lambda: torch.randn(n, generator=gen) * 10.0 ** torch.randint(-30, 30, (n,)),
        "infinite": lambda: torch.tensor([math.inf, -math.inf, 1.0, -1.0]).repeat(n)[:n],
    }[kind]()
    return scores.masked_fill(~store.live, math.nan)


def check(
    store: values.Segments,
    scores: Tensor,
    order: tuple[int, int] = (0, 0),
    active: Sequence[bool] = (True, True),
    **changes: object,
) -> tuple[Tensor, Tensor]:
    """Every decision like the law's; ``active`` has an entry for each batch row."""
    options = DEFAULTS | changes
    active = torch.tensor(active)
    want_keep, want_kept = reference.select(scores, store, active, **options)
    keep, num_kept = run(store, scores, active, options, order)
    assert num_kept.tolist() == want_kept.tolist()
    rows = store.live_rows()[0]
    poisoned = torch.repeat_interleave(want_kept < 0, store.seqused_k.long())
    assert torch.equal(keep[rows][~poisoned], want_keep[rows][~poisoned])
    assert bool((keep[~store.live] == 77).all())
    return keep, num_kept


RULES = {
    "threshold": {},
    "no_threshold": {"threshold": -math.inf},
    "budget": {"cache_size": 9},
    "budget_1": {"cache_size": 1},
    "budget_no_threshold": {"cache_size": 30, "threshold": -math.inf},
    "budget_huge": {"cache_size": 10**6},
    "fill": {"fill": True},
    "fill_budget": {"fill": True, "cache_size": 12},
    "fill_high_threshold": {"fill": True, "threshold": 1.0},
    "layer": {"budget": "per_layer", "cache_size": 8},
    "layer_tiny": {"budget": "per_layer", "cache_size": 1},
    "layer_no_threshold": {"budget": "per_layer", "cache_size": 25, "threshold": -math.inf},
    "layer_no_budget": {"budget": "per_layer"},
    "unprotected": {"protect_newest": False, "threshold": 0.5, "cache_size": 5},
    "sinks_recent": {"sink_tokens": 12, "recent_tokens": 9, "cache_size": 8},
    "sinks_recent_layer": {
        "sink_tokens": 9, "recent_tokens": 5, "cache_size": 4, "budget": "per_layer",
    },
    "nothing_stays": {"protect_newest": False, "threshold": math.inf},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "wide", "infinite"])
@pytest.mark.parametrize("rule", RULES)
def test_select(rule, kind):
    store = make_store([[40, 3, 0], [1, 25, 64]])
    check(store, make_scores(store, kind), **RULES[rule])


@pytest.mark.parametrize("rule", ["fill", "layer", "sinks_recent_layer", "budget"])
@pytest.mark.parametrize("order", emulated.ORDERS[1:], ids=["backwards", "random"])
def test_select_orders(rule, order):
    store = make_store([[70, 33], [5, 41]])
    check(store, make_scores(store, "ties"), order, **RULES[rule])


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("rule", ["threshold", "budget", "fill", "layer", "layer_no_threshold"])
def test_segment_of_several_blocks(rule, kind):
    store = make_store([[2200, 30], [7, 4100]])
    check(store, make_scores(store, kind), (3, 7), **RULES[rule])


@pytest.mark.parametrize("rule", ["threshold", "budget", "fill", "layer", "layer_no_threshold"])
def test_nan_is_reported_and_poisons_its_segment_only(rule):
    store = make_store([[20, 30], [9, 12]])
    scores = make_scores(store, "normal")
    scores[int(store.cu_seqlens_k[1]) + 4] = math.nan
    _, num_kept = check(store, scores, **RULES[rule])
    assert num_kept[1] == -1
    assert bool((num_kept[[0, 2, 3]] >= 0).all())


def test_nan_takes_nothing_of_a_shared_budget():
    # One row too many, and a segment with a NaN beside it.
    store = make_store([[21, 30]])
    scores = make_scores(store, "normal")
    scores[int(store.cu_seqlens_k[1])] = math.nan
    _, num_kept = check(store, scores, active=[True], budget="per_layer", cache_size=10,
                        threshold=-math.inf)  # fmt: skip
    assert num_kept.tolist() == [20, -1]


@pytest.mark.parametrize("rule", ["threshold", "fill_budget", "layer"])
def test_inactive_rows_keep_everything(rule):
    store = make_store([[20, 30], [9, 12]])
    scores = make_scores(store, "normal")
    scores[int(store.cu_seqlens_k[2])] = math.nan  # not looked at
    _, num_kept = check(store, scores, active=[True, False], **RULES[rule])
    assert num_kept[2:].tolist() == [9, 12]


def test_newest_tie_across_heads_goes_to_the_first():
    # All segments' newest rows are equal in rank; the budget holds two of the three.
    store = make_store([[4, 4, 4]])
    _, num_kept = check(
        store,
        make_scores(store, "zeros"),
        active=[True],
        budget="per_layer",
        cache_size=1,
        recent_tokens=0,
    )
    assert num_kept.tolist() == [1, 1, 1]
    store = make_store([[4, 4, 4, 4]], num_tail=4)
    check(store, torch.zeros(store.capacity), active=[True], budget="per_layer", cache_size=1,
          protect_newest=False)  # fmt: skip


def test_equal_keys_across_heads():
    # Same positions and scores in every head: the cut falls inside a run of equal integers.
    store = make_store([[6, 6, 6, 6, 6]], num_tail=6)
    scores = torch.zeros(store.capacity)
    for size in (1, 2, 3):
        _, num_kept = check(
            store, scores, active=[True], budget="per_layer", cache_size=size, protect_newest=False
        )
        assert int(num_kept.sum()) == 5 * size
    _, num_kept = check(
        store, scores, active=[True], budget="per_layer", cache_size=1, recent_tokens=3
    )
    assert num_kept.tolist() == [1] * 5


def test_equal_keys_cut_between_heads():
    store = make_store([[3, 3, 3]], num_tail=3)
    scores = torch.zeros(store.capacity)
    for s, first in enumerate(store.cu_seqlens_k[:3].tolist()):
        scores[first] = 1.0 if s == 2 else 0.0  # head 2 takes a place, heads 0 and 1 share two
    _, num_kept = check(
        store, scores, active=[True], budget="per_layer", cache_size=1, protect_newest=False
    )
    assert num_kept.tolist() == [1, 1, 1]
    scores[int(store.cu_seqlens_k[2]) + 2] = 1.0
    _, num_kept = check(
        store, scores, active=[True], budget="per_layer", cache_size=1, protect_newest=False
    )
    assert num_kept.tolist() == [1, 0, 2]


def test_equal_keys_behind_a_head_without_them():
    store = make_store([[3, 3, 3]], num_tail=3)
    scores = torch.full((store.capacity,), -1.0)
    first = store.cu_seqlens_k[:3].tolist()
    scores[first[0] : first[0] + 2] = 2.0
    scores[first[1]] = scores[first[2]] = 1.0  # one place is left for them
    _, num_kept = check(
        store, scores, active=[True], budget="per_layer", cache_size=1, protect_newest=False
    )
    assert num_kept.tolist() == [2, 1, 0]
