"""A corridor of signs and doors: control that needs a memory. numpy alone.

Signs in the first part of a corridor say which exit leads through doors of a colour; doors of some
of these colours stand in the rest of it, each colour several times. One cell is seen at a time, so
whoever forgets a sign can only guess. Half of the signs are of colours that never come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLAIN, SIGN, DOOR = 0, 1, 2
FORWARD = 0
SPLITS = ("train", "validation", "test")

Array = NDArray[Any]


@dataclass(frozen=True)
class CorridorConfig:
    """Sizes of a corridor.

    Attributes:
        steps: time steps of an episode, and cells; the best walk sees every cell once.
        sign_cells: cells of the first part, which has the signs; the rest has the doors.
        signs: signs, each of another colour.
        used: colours of these that have doors.
        doors_per_colour: doors of each such colour.
        colours: colours there are.
        exits: exits of a door; the actions are "forward" and these.
        texture: random bits that every cell shows and that mean nothing.

    Raises:
        ValueError: if something does not fit.
    """

    steps: int = 200
    sign_cells: int = 60
    signs: int = 24
    used: int = 12
    doors_per_colour: int = 3
    colours: int = 24
    exits: int = 4
    texture: int = 4

    def __post_init__(self) -> None:
        for name, most in (
            ("signs", min(self.sign_cells, self.colours)),
            ("used", self.signs),
            ("sign_cells", self.steps - self.doors),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"CorridorConfig: {name} must be in [1, {most}], got {getattr(self, name)}"
                )

    @property
    def doors(self) -> int:
        """Doors of a corridor, the best return."""
        return self.used * self.doors_per_colour

    @property
    def state_dim(self) -> int:
        """Numbers of a state: kind of the cell, colour, exit that a sign shows, texture."""
        return 3 + self.colours + self.exits + self.texture

    @property
    def act_dim(self) -> int:
        """Actions: forward, and the exits."""
        return 1 + self.exits


class Corridor:
    """Corridors side by side, one for each seed, in which time passes together.

    A step forward leads to the next cell, but at a door, where an exit has to be taken; any exit
    leads on, and the one of the colour's sign is rewarded with 1. Everything else is a bump: the
    agent stays and time passes.

    Args:
        seeds: of the B corridors.
        split: "train", "validation" or "test": the same seed is another corridor in each.
        config: sizes.

    Attributes:
        was_best: ``[B]`` bool, whether the last actions were the best ones.

    Example:
        >>> corridor = Corridor([0, 1])
        >>> corridor.reset().shape
        (2, 35)
        >>> while True:
        ...     _, rewards, done = corridor.step(corridor.best_actions())
        ...     if done.all():
        ...         break
        >>> corridor.returns.tolist()
        [36.0, 36.0]
    """

    def __init__(
        self, seeds: Sequence[int], split: str = "train", config: CorridorConfig | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Corridor: split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.config = CorridorConfig() if config is None else config
        cells = [_cells(self.config, (SPLITS.index(split), seed)) for seed in seeds]
        self.kind, self.colour, self.exit, self.texture = map(np.stack, zip(*cells, strict=True))
        self.reset()

    def __len__(self) -> int:
        return len(self.kind)

    def reset(self) -> Array:
        """Back to the start; ``[B, state_dim]`` float32."""
        self.cell = np.zeros(len(self), np.int64)
        self.time = 0
        self.returns = np.zeros(len(self))
        self.was_best = np.ones(len(self), bool)
        return self._states()

    def best_actions(self) -> Array:
        """``[B]`` actions of one who has forgotten nothing."""
        return np.where(self._here(self.kind) == DOOR, 1 + self._here(self.exit), FORWARD)

    def step(self, actions: Array) -> tuple[Array, Array, Array]:
        """Let time pass.

        Args:
            actions: ``[B]`` integers, or ``[B, act_dim]`` of which the largest counts.

        Returns:
            states ``[B, state_dim]`` float32, rewards ``[B]`` float64, done ``[B]`` bool.

        Raises:
            ValueError: after the last step, or for an action that there is not.
        """
        if self.time >= self.config.steps:
            raise ValueError(f"Corridor: an episode must end after {self.time} steps, call reset")
        actions = np.asarray(actions)
        actions = actions.argmax(1) if actions.ndim == 2 else actions
        if actions.min() < 0 or actions.max() >= self.config.act_dim:
            raise ValueError(
                f"Corridor: actions must be in [0, {self.config.act_dim}), got {actions.tolist()}"
            )
        self.was_best = actions == self.best_actions()
        at_door = self._here(self.kind) == DOOR
        rewards = (at_door & self.was_best).astype(float)
        moves = at_door == (actions != FORWARD)
        self.time += 1
        self.cell = np.minimum(self.cell + moves, self.config.steps - 1)
        self.returns += rewards
        return self._states(), rewards, np.full(len(self), self.time == self.config.steps)

    def _here(self, values: Array) -> Array:
        return values[np.arange(len(self)), self.cell]

    def _states(self) -> Array:
        c, kind = self.config, self._here(self.kind)
        coloured = (kind != PLAIN)[:, None]
        parts = (
            np.eye(3)[kind],
            np.eye(c.colours)[self._here(self.colour)] * coloured,
            np.eye(c.exits)[self._here(self.exit)] * (kind == SIGN)[:, None],
            self._here(self.texture),
        )
        return np.concatenate(parts, axis=1).astype(np.float32)


def _cells(c: CorridorConfig, seed: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Kind, colour, exit ``[steps]`` and texture ``[steps, texture]`` of the cells."""
    rng = np.random.default_rng(seed)
    kind, colour, exit_ = np.zeros((3, c.steps), np.int64)
    signs = rng.choice(c.sign_cells, c.signs, replace=False)
    colours = rng.permutation(c.colours)[: c.signs]
    exits = rng.integers(c.exits, size=c.colours)
    kind[signs], colour[signs] = SIGN, colours
    doors = c.sign_cells + rng.choice(c.steps - c.sign_cells, c.doors, replace=False)
    kind[doors] = DOOR
    colour[doors] = rng.permutation(np.repeat(colours[: c.used], c.doors_per_colour))
    exit_[:] = exits[colour]
    return kind, colour, exit_, rng.choice([-1.0, 1.0], size=(c.steps, c.texture))


@dataclass(frozen=True)
class Episodes:
    """What was seen, done and earned in B episodes of T steps.

    Attributes:
        states: ``[B, T, state_dim]`` float32.
        actions: ``[B, T]`` int64.
        rewards: ``[B, T]`` float64.
        best: ``[B, T]`` bool, whether an action was the best one.
    """

    states: Array
    actions: Array
    rewards: Array
    best: Array

    @property
    def returns_to_go(self) -> Array:
        """``[B, T]`` rewards from each step on."""
        return self.rewards[:, ::-1].cumsum(1)[:, ::-1]


def record(corridor: Corridor, noise: Array | float, seed: int) -> Episodes:
    """Episodes of agents that do the best thing, or, so often, anything.

    Args:
        corridor: where; it is reset.
        noise: probability of a random action, a number or ``[B]``: 0 is an expert, 1 knows nothing.
        seed: of the random actions.
    """
    rng = np.random.default_rng(seed)
    noise = np.broadcast_to(noise, len(corridor))
    states, seen = corridor.reset(), []
    for _ in range(corridor.config.steps):
        random = rng.integers(corridor.config.act_dim, size=len(corridor))
        at_random = rng.random(len(corridor)) < noise
        actions = np.where(at_random, random, corridor.best_actions())
        after, rewards, _ = corridor.step(actions)
        seen.append((states, actions, rewards, corridor.was_best))
        states = after
    return Episodes(*(np.stack(part, axis=1) for part in zip(*seen, strict=True)))
