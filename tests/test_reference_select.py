"""The selection of the law against sorted tuples."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from namm_ext import reference
from namm_ext.values import Segments
from reference_oracles import F64, NAN, RaggedLayer, Setting, ints, select_oracle


def run_select(scores: list[list[float]], pos=None, num_rows: int = 1, room: int = 2, **args):
    """Select on lists of segments with poisoned room behind each; returns flags and counts."""
    pos = pos or [list(range(len(row))) for row in scores]
    flat_scores: list[float] = []
    flat_pos: list[int] = []
    for row, positions in zip(scores, pos, strict=True):
        flat_scores += [*row, *[NAN] * room]
        flat_pos += [*positions, *[-(10**6)] * room]
    cu = RaggedLayer.slots([len(row) + room for row in scores])
    k = torch.zeros(len(flat_pos), 0)
    store = Segments(k, k, ints(*flat_pos), k, cu, ints(*(len(row) for row in scores)))
    keep, num_kept = reference.select(
        torch.tensor(flat_scores, dtype=F64), store, torch.ones(num_rows, dtype=torch.bool),
        **{**Setting().select_args, **args},
    )  # fmt: skip
    flags = [[bool(f) for f in keep[rows]] for rows in store.slices()]
    return flags, num_kept.tolist()


def select_cases():
    for budget, fill in (("per_head", False), ("per_head", True), ("per_layer", False)):
        for threshold, cache_size in itertools.product((-math.inf, 0.0, 5.0), (-1, 1, 4, 100)):
            yield {
                "budget": budget, "fill": fill, "threshold": threshold, "cache_size": cache_size
            }  # fmt: skip


@pytest.mark.parametrize(
    "args", list(select_cases()),
    ids=lambda a: "-".join(["fill" if a["fill"] else "ragged", a["budget"],
                            f"tau{a['threshold']}", f"C{a['cache_size']}"]),
)  # fmt: skip
def test_select_equals_sorted_tuples(args):
    rng = random.Random(7)
    for trial in range(40):
        num_rows, num_heads = rng.choice([(1, 1), (1, 3), (2, 2)])
        floors = {
            "protect_newest": rng.random() < 0.7,
            "sink_tokens": rng.choice([0, 0, 2]),
            "recent_tokens": rng.choice([0, 0, 3]),
        }
        scores, pos = [], []
        for _ in range(num_rows * num_heads):
            n = rng.choice([0, 1, 2, 9, 14])
            scores.append([float(rng.choice([-2, -1, -0.0, 0.0, 1, 2])) for _ in range(n)])
            pos.append(sorted(rng.sample(range(30), n)))
        flags, num_kept = run_select(scores, pos, num_rows, **args, **floors)
        for b in range(num_rows):
            heads = slice(b * num_heads, (b + 1) * num_heads)
            want = select_oracle(
                [[x + 0.0 for x in row] for row in scores[heads]], pos[heads], **args, **floors
            )
            assert flags[heads] == want, (trial, scores, pos, floors)
            assert num_kept[heads] == [sum(f) for f in want]


def test_zero_of_either_sign_is_kept_and_ties_go_to_the_newer():
    flags, _ = run_select([[-0.0, 0.0, -1e-30, -5.0]])
    assert flags == [[True, True, False, True]]
    flags, _ = run_select([[0.0, -0.0, 0.0, -0.0]], cache_size=2, protect_newest=False)
    assert flags == [[False, False, True, True]]


def test_zero_scores_under_a_budget_are_a_recency_window():
    flags, num_kept = run_select(
        [[0.0] * 6, [0.0] * 6], pos=[[0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8, 10]],
        cache_size=3, budget="per_layer",
    )  # fmt: skip
    # Shared by the heads: the newest six positions of both, then the lower head.
    assert flags == [[False] * 4 + [True] * 2, [False, False, True, True, True, True]]
    assert num_kept == [2, 4]


def test_newest_survives_any_score_in_each_head():
    low, high = [-9.0] * 5, [1.0] * 5
    for args in ({"threshold": 0.0}, {"cache_size": 1, "budget": "per_layer"}):
        flags, _ = run_select([low, high], **args)
        assert flags[0] == [False] * 4 + [True]
        assert flags[1][-1]


def test_fill_lifts_every_head_to_the_fullest():
    flags, num_kept = run_select([[-5.0, -1.0, -3.0, -9.0], [1.0, 1.0, -1.0, -1.0]], fill=True)
    assert flags == [[False, True, True, True], [True, True, False, True]]
    assert num_kept == [3, 3]


def test_fill_never_couples_batch_rows():
    _, num_kept = run_select([[1.0] * 4, [-1.0] * 4], num_rows=2, fill=True)
    assert num_kept == [4, 1]


@pytest.mark.parametrize(("fill", "budget"), [
    (False, "per_head"), (True, "per_head"), (False, "per_layer"),
])  # fmt: skip
def test_nan_is_reported_in_its_segment(fill, budget):
    scores = [[1.0, NAN, 1.0], [1.0, -1.0, 1.0], [1.0], [1.0]]
    _, num_kept = run_select(scores, num_rows=2, fill=fill, budget=budget, cache_size=2)
    assert num_kept[0] == -1
    assert num_kept[1] == 2
    assert num_kept[2:] == [1, 1]


def test_infinite_scores_are_scores():
    flags, _ = run_select([[math.inf, -math.inf, 0.0, -1.0]], cache_size=2)
    assert flags == [[True, False, False, True]]


def test_select_refuses_contradictions():
    with pytest.raises(ValueError, match="budget must be 'per_head' or 'per_layer', got 'global'"):
        run_select([[1.0]], budget="global")
    with pytest.raises(ValueError, match="fill must be False with budget 'per_layer', got True"):
        run_select([[1.0]], budget="per_layer", fill=True)
