"""The corridor of signs and doors: rewards, quality of agents, splits, states."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
from namm_ext.tasks.corridor import (
    DOOR,
    FORWARD,
    SIGN,
    Corridor,
    CorridorConfig,
    record,
)

SMALL = CorridorConfig(steps=30, sign_cells=9, signs=6, used=3, doors_per_colour=2, colours=8)


def test_docstrings() -> None:
    module = importlib.import_module("namm_ext.tasks.corridor")
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


def test_signs_say_what_doors_ask() -> None:
    corridor = Corridor(range(8), "train", SMALL)
    for kind, colour, exit_ in zip(corridor.kind, corridor.colour, corridor.exit, strict=True):
        signs, doors = (kind == SIGN).nonzero()[0], (kind == DOOR).nonzero()[0]
        assert len(signs) == SMALL.signs
        assert len(set(colour[signs])) == SMALL.signs
        assert signs.max() < SMALL.sign_cells <= doors.min()
        assert sorted(np.bincount(colour[doors])[np.unique(colour[doors])]) == [2, 2, 2]
        shown = dict(zip(colour[signs], exit_[signs], strict=True))
        assert all(shown[c] == e for c, e in zip(colour[doors], exit_[doors], strict=True))


def test_states_show_one_cell() -> None:
    corridor = Corridor(range(4), "train", SMALL)
    states = record(corridor, 0.0, seed=0).states
    kinds, colours, exits = states[..., :3], states[..., 3:11], states[..., 11:15]
    assert (kinds.argmax(-1) == corridor.kind).all()
    plain = corridor.kind == 0
    assert (colours.sum(-1) == ~plain).all()
    assert (exits.sum(-1) == (corridor.kind == SIGN)).all()  # doors do not tell
    assert (np.abs(states[..., 15:]) == 1).all()


def test_quality_of_agents() -> None:
    corridor = Corridor(range(32), "train", SMALL)
    earned = [record(corridor, noise, seed=1) for noise in (0.0, 0.3, 1.0)]
    means = [episodes.rewards.sum(1).mean() for episodes in earned]
    assert means[0] == SMALL.doors
    assert means[0] > means[1] > means[2] + 1
    assert earned[0].best.all()
    assert 0.15 < 1 - earned[1].best.mean() < 0.3
    assert (earned[1].returns_to_go[:, 0] == earned[1].rewards.sum(1)).all()
    assert (earned[1].returns_to_go[:, -1] == earned[1].rewards[:, -1]).all()


def test_bumps_and_wrong_exits() -> None:
    corridor = Corridor([0], "train", SMALL)
    corridor.reset()
    corridor.step(np.array([1]))  # into the wall
    assert corridor.cell[0] == 0
    assert not corridor.was_best[0]
    while corridor.kind[0, corridor.cell[0]] != DOOR:
        corridor.step(np.array([FORWARD]))
    corridor.step(np.array([FORWARD]))  # the door is no cell to walk through
    before, right = corridor.cell[0], corridor.best_actions()[0]
    _, rewards, _ = corridor.step(np.array([1 + right % SMALL.exits]))
    assert rewards[0] == 0
    assert corridor.cell[0] == before + 1


def test_seeds_and_splits() -> None:
    first, again, other = (
        Corridor([3, 4], split, SMALL) for split in ("train", "train", "validation")
    )
    assert (first.colour == again.colour).all()
    assert (first.colour != other.colour).any()
    assert (first.colour[0] != first.colour[1]).any()
    assert (Corridor([4], "train", SMALL).colour[0] == first.colour[1]).all()


def test_one_hot_actions_and_errors() -> None:
    corridor, twin = Corridor([0], "train", SMALL), Corridor([0], "train", SMALL)
    a = corridor.step(np.array([FORWARD]))
    b = twin.step(np.eye(SMALL.act_dim)[[FORWARD]])
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    with pytest.raises(ValueError, match=r"actions must be in \[0, 5\), got \[5\]"):
        corridor.step(np.array([5]))
    record(corridor, 0.0, seed=0)
    with pytest.raises(ValueError, match="must end after 30 steps"):
        corridor.step(np.array([0]))
    with pytest.raises(ValueError, match="split must be one of train"):
        Corridor([0], "dev")
    with pytest.raises(ValueError, match=r"used must be in \[1, 6\], got 7"):
        CorridorConfig(steps=30, sign_cells=9, signs=6, used=7)
