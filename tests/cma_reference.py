"""CMA-ES as the original runs it, equation by equation, in float64 NumPy.

Equation numbers are those of Hansen's tutorial, arXiv 1604.00772. Only for replaying the
``cma_*`` vectors: evolution itself uses pycma with a diagonal covariance, because at 4172
dimensions the learning rates of the full matrix are near 1e-6.
Deviations of the original from the tutorial are marked "Not in the tutorial".
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Constants:
    """Weights and rates for dimension n and population size lambda; default settings, Table 1."""

    weights: Array
    mu_eff: float
    c_1: float
    c_mu: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_m: float
    chi_n: float
    elite: int


def constants(n: int, popsize: int) -> Constants:
    """Eqs. (49)-(58)."""
    elite = popsize // 2
    raw = math.log((popsize + 1) / 2) - np.log(np.arange(1, popsize + 1))  # Eq. (49)
    mu_eff = raw[:elite].sum() ** 2 / (raw[:elite] ** 2).sum()
    mu_eff_minus = raw[elite:].sum() ** 2 / (raw[elite:] ** 2).sum()
    c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)  # Eq. (57)
    # Not in the tutorial: 1e-8, and no 1/4 in the numerator; Eq. (58).
    c_mu = min(1 - c_1 - 1e-8, 2 * (mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff))
    negative_sum = min(
        1 + c_1 / c_mu,  # Eq. (50)
        1 + 2 * mu_eff_minus / (mu_eff + 2),  # Eq. (51)
        (1 - c_1 - c_mu) / (n * c_mu),  # Eq. (52)
    )
    positive = raw > 0
    weights = np.where(
        positive, raw / raw[positive].sum(), negative_sum * raw / -raw[~positive].sum()
    )  # Eq. (53)
    c_sigma = (mu_eff + 2) / (n + mu_eff + 5)  # Eq. (55)
    d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
    c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)  # Eq. (56)
    chi_n = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    return Constants(weights, mu_eff, c_1, c_mu, c_sigma, d_sigma, c_c, 1.0, chi_n, elite)


class CMAES:
    """Maximises. ``decompose`` belongs to ask, ``tell`` takes the sampled steps y."""

    def __init__(self, mean: Array, sigma: float, popsize: int):
        self.n = mean.size
        self.k = constants(self.n, popsize)
        self.mean, self.sigma = mean.astype(np.float64), float(sigma)
        self.C = np.eye(self.n)
        self.p_sigma, self.p_c = np.zeros(self.n), np.zeros(self.n)
        self.generation = 0
        self.best_fitness, self.best_member = -math.inf, np.zeros(self.n)
        self.sample_C = self.C

    def decompose(self) -> tuple[Array, Array]:
        """B and D of ``y = B D z``, Eqs. (38)-(39)."""
        self.sample_C = (self.C + self.C.T) / 2
        if self.generation == 0:
            # Not in the tutorial: meant as a shift of the diagonal, added to every entry.
            self.sample_C = self.sample_C + 1e-6
        eigenvalues, B = np.linalg.eigh(self.sample_C)
        D = np.sqrt(np.where(eigenvalues > 0, eigenvalues, 1e-20))
        return B, D

    def tell(self, y: Array, fitness: Array) -> None:
        """One update from steps y ``[popsize, n]`` and their fitness (higher is better)."""
        k, n = self.k, self.n
        B, D = self.decompose()
        inv_sqrt_C = B @ np.diag(1 / D) @ B.T
        order = np.argsort(-fitness)
        x_best = self.mean + self.sigma * y[order[0]]
        if fitness[order[0]] > self.best_fitness:
            self.best_fitness, self.best_member = float(fitness[order[0]]), x_best
        y = y[order]
        self.generation += 1

        y_w = k.weights[: k.elite] @ y[: k.elite]  # Eq. (41)
        self.mean = self.mean + k.c_m * self.sigma * y_w  # Eq. (42)

        # Step-size path, Eq. (43), and step size, Eq. (44).
        self.p_sigma = (1 - k.c_sigma) * self.p_sigma + math.sqrt(
            k.c_sigma * (2 - k.c_sigma) * k.mu_eff
        ) * (inv_sqrt_C @ y_w)
        length = float(np.linalg.norm(self.p_sigma))
        unbiased = length / math.sqrt(1 - (1 - k.c_sigma) ** (2 * self.generation))
        h_sigma = float(unbiased < (1.4 + 2 / (n + 1)) * k.chi_n)

        # Covariance, Eqs. (45)-(47).
        self.p_c = (1 - k.c_c) * self.p_c + h_sigma * math.sqrt(
            k.c_c * (2 - k.c_c) * k.mu_eff
        ) * y_w
        lengths = ((y @ inv_sqrt_C.T) ** 2).sum(axis=1)
        w = np.where(k.weights >= 0, k.weights, k.weights * n / (lengths + 1e-20))
        decay = 1 + k.c_1 * (1 - h_sigma) * k.c_c * (2 - k.c_c) - k.c_1 - k.c_mu * k.weights.sum()
        self.C = decay * self.C + k.c_1 * np.outer(self.p_c, self.p_c) + k.c_mu * (y.T * w) @ y
        self.sigma *= math.exp(k.c_sigma / k.d_sigma * (length / k.chi_n - 1))
