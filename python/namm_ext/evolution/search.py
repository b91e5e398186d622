"""CMA-ES with a diagonal covariance matrix (pycma), resumable bit for bit without pickles.

At n = 4172 the learning rates of a full covariance matrix are about 1e-6: it stays the identity for
as long as anybody evolves, while its decomposition costs minutes per generation (the original's
implementation does pay them). pycma's diagonal mode costs milliseconds and loses nothing.

A search is a deterministic function of (x0, sigma0, popsize, seed) and the losses it was told, so a
checkpoint is just those numbers, and `replay` rebuilds the state by asking and telling again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class DiagonalCMA:
    """Ask for candidates, tell their fitness (higher is better).

    Args:
        x0: ``[n]`` initial mean.
        sigma0: initial step size.
        popsize: candidates per generation.
        seed: seeds a generator of its own; numpy's global one is neither read nor changed.

    Raises:
        ImportError: without pycma; the message names the extra that brings it.

    Example:
        >>> search = DiagonalCMA(np.zeros(10), sigma0=0.3, popsize=8, seed=1)
        >>> for _ in range(50):
        ...     candidates = search.ask()
        ...     search.tell([-float(np.sum((x - 1) ** 2)) for x in candidates])
        >>> bool(np.sum((search.mean - 1) ** 2) < 1)
        True
    """

    def __init__(self, x0: Array, sigma0: float, popsize: int, seed: int) -> None:
        try:
            with warnings.catch_warnings():  # that it cannot plot: nobody asks it to
                warnings.simplefilter("ignore", UserWarning)
                import cma
        except ImportError as error:
            raise ImportError("evolution needs pycma: pip install 'namm_ext[evolve]'") from error
        rng = np.random.default_rng(seed)
        options = {
            "CMA_diagonal": True,
            "popsize": popsize,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # do not touch numpy's global generator
            "verbose": -9,
        }
        self._es = cma.CMAEvolutionStrategy(np.asarray(x0, np.float64), sigma0, options)
        self._candidates: list[Array] | None = None
        self.popsize = popsize
        self.history: list[list[float]] = []

    @property
    def generation(self) -> int:
        """Generations told so far."""
        return len(self.history)

    @property
    def mean(self) -> Array:
        """``[n]`` mean of the search distribution: what evaluation and inference use."""
        return np.asarray(self._es.mean, np.float64)

    @property
    def sigma(self) -> float:
        """Current step size."""
        return float(self._es.sigma)

    def ask(self) -> Array:
        """``[popsize, n]`` candidates; the same ones again until they are told."""
        if self._candidates is None:
            self._candidates = self._es.ask()
        return np.stack(self._candidates)

    def tell(self, fitness: Sequence[float]) -> None:
        """Report the fitness of the candidates last asked for, in their order.

        Raises:
            ValueError: if the number of values is not ``popsize`` or one is not finite; the search
                is unchanged then.
        """
        values = [float(value) for value in fitness]
        if len(values) != self.popsize:
            raise ValueError(f"fitness must hold {self.popsize} values, got {len(values)}")
        for candidate, value in enumerate(values):
            if not np.isfinite(value):
                raise ValueError(f"fitness must be finite, got {value} for candidate {candidate}")
        self.ask()
        self._es.tell(self._candidates, [-value for value in values])  # pycma minimises
        self._candidates = None
        self.history.append(values)

    def replay(self, history: Sequence[Sequence[float]]) -> None:
        """Bring a fresh search to the state after ``history``, a list of told fitness values."""
        for values in history:
            self.tell(values)
