"""Evolution of memories: population evaluation, CMA-ES search, checkpoints, the training loop."""

from .evaluate import Evaluation, evaluate_policy, evaluate_population
from .imitate import ImitateConfig, imitate
from .search import DiagonalCMA
from .train import (
    EvolveConfig,
    EvolveResult,
    calibrate_statistics,
    calibration_batch,
    evolve,
    training_batch,
    validation_batches,
    with_budget,
)

__all__ = [
    "DiagonalCMA",
    "Evaluation",
    "EvolveConfig",
    "EvolveResult",
    "ImitateConfig",
    "calibrate_statistics",
    "calibration_batch",
    "evaluate_policy",
    "evaluate_population",
    "evolve",
    "imitate",
    "training_batch",
    "validation_batches",
    "with_budget",
]
