"""Ridge regression in closed form, from sums that texts are added to one by one."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Linear regression of ``y [n, O]`` on ``x [n, I]`` in float64, both standardised within.

    Args:
        num_inputs: I.
        num_outputs: O.

    Example:
        >>> x = torch.arange(8.0)[:, None]
        >>> fit = Ridge(1, 1)
        >>> fit.add(x, 2 * x + 1)
        >>> weight, bias = fit.solve(1e-9)
        >>> round(float(weight), 4), round(float(bias), 4)
        (2.0, 1.0)
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self.num_inputs = num_inputs
        size = num_inputs + num_outputs
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in ``x [n, I]`` and ``y [n, O]``."""
        both = torch.cat([x, y], dim=1).double().cpu()
        self.count += both.shape[0]
        self.total += both.sum(0)
        self.products += both.T @ both

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """``weight [O, I]`` and ``bias [O]`` for inputs as they are, float32.

        Args:
            penalty: on the squared weights of the standardised inputs, relative to their variance.

        Raises:
            ValueError: if fewer than two rows were added.
        """
        if self.count < 2:
            raise ValueError(f"Ridge: at least two rows must be added, got {self.count}")
        n = self.num_inputs
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        std = covariance.diagonal()[:n].clamp(min=1e-12).sqrt()
        xx = covariance[:n, :n] / torch.outer(std, std)
        xy = covariance[:n, n:] / std[:, None]
        xx.diagonal().add_(penalty)
        weight = torch.linalg.solve(xx, xy).T / std
        bias = mean[n:] - weight @ mean[:n]
        return weight.float(), bias.float()
