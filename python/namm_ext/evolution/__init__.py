"""Evolution of memories: population evaluation, CMA-ES search, checkpoints, the training loop."""

from .evaluate import Evaluation, evaluate_policy, evaluate_population
from .search import DiagonalCMA
from .train import (
    EvolveConfig,
    EvolveResult,
    calibrate_statistics,
    calibration_batch,
    evolve,
    linear_start,
    training_batch,
    validation_batch,
    with_budget,
)

__all__ = [
    "DiagonalCMA",
    "Evaluation",
    "EvolveConfig",
    "EvolveResult",
    "calibrate_statistics",
    "calibration_batch",
    "evaluate_policy",
    "evaluate_population",
    "evolve",
    "linear_start",
    "training_batch",
    "validation_batch",
    "with_budget",
]
