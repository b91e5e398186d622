"""The planner: where a call is cut so that updates come when they are due."""

from __future__ import annotations

import torch
from namm_ext.ragged import Planner

CPU = torch.device("cpu")


def test_planner_cuts_at_updates():
    pieces = Planner(16)((5, 5), 40, None, CPU)
    assert [(p.columns.start, p.columns.stop) for p in pieces] == [(0, 11), (11, 27), (27, 40)]
    assert [p.due and p.due.rows for p in pieces] == [(True, True), (True, True), None]
    assert [p.pos_first.tolist() for p in pieces] == [[5, 5], [16, 16], [32, 32]]
    assert pieces[0].due.pos_q.tolist() == [-16, -16]
    assert pieces[1].due.pos_q.tolist() == [0, 0]
    assert pieces[-1].seen == (45, 45)


def test_planner_lets_rows_update_apart():
    pieces = Planner(16)((15, 0), 20, (((0, 20),), ((3, 17),)), CPU)
    assert [(p.first.tolist(), p.num_new.tolist()) for p in pieces] == [
        ([0, 3], [1, 16]), ([1, 19], [16, 1]), ([17, 0], [3, 0]),
    ]  # fmt: skip
    assert [p.due and p.due.rows for p in pieces] == [(True, True), (True, False), None]
    assert pieces[1].due.pos_q.tolist() == [0, 0]  # row 1 stands 1 token behind its update
    assert pieces[0].columns is None
    assert [p.pos_first.tolist() for p in pieces] == [[15, 0], [16, 16], [32, 17]]


def test_planner_cuts_at_holes():
    pieces = Planner(16)((15, 0), 20, (((0, 2), (6, 9)), ((4, 3),)), CPU)
    assert [(p.first.tolist(), p.num_new.tolist()) for p in pieces] == [
        ([0, 4], [1, 3]), ([1, 0], [1, 0]), ([6, 0], [9, 0]),
    ]  # fmt: skip
    assert [p.due and p.due.rows for p in pieces] == [(True, False), None, None]
    assert pieces[-1].seen == (26, 3)
    assert Planner(16)((15, 0), 0, None, CPU) == ()


def test_planner_answers_all_layers_alike():
    planner = Planner(16)
    first = planner((3, 3), 1, None, CPU)
    assert planner((3, 3), 1, None, CPU) is first
    # Rows of different length that all move by one: positions come from the last tensor.
    apart = planner((3, 9), 1, None, CPU)[0]
    after = planner((4, 10), 1, None, CPU)[0]
    assert after.pos_first.tolist() == [4, 10]
    assert apart.pos_first.tolist() == [3, 9]
    assert planner((4, 11), 1, None, CPU)[0].pos_first.tolist() == [4, 11]
    # A batch of another size that moves by one as well.
    assert planner((5,), 1, None, CPU)[0].pos_first.tolist() == [5]
    assert planner((6, 12, 3), 1, None, CPU)[0].pos_first.tolist() == [6, 12, 3]
