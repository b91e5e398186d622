"""A small problem of evolution, a model for it and a memory."""

from __future__ import annotations

from typing import Any

import torch
from namm_ext import Budget, NAMMConfig, tasks
from namm_ext.evolution import EvolveConfig, RecordProblem

N_UP = 16
MEMORY = NAMMConfig(n_up=N_UP, feature_transform="log")
BUDGET = Budget(0.25, scope="per_layer")
CONFIG = EvolveConfig(
    namm=MEMORY, budget=BUDGET, generations=4, popsize=4, sigma0=0.3, validate_every=2
)


def texts(split: str) -> tuple[str, ...]:
    return (f"# {split}\n" + "\n".join(f"{split}_{i} = {i} * value" for i in range(200)),)


TRAIN, VALIDATION = texts("train"), texts("validation")


def make_problem(tokenizer: Any, **changes: Any) -> RecordProblem:
    sizes = {"lengths": (96, 112), "num_examples": 2, "validation_lengths": (128,)}
    mixes = (tasks.RecordMix(2), tasks.RecordMix(1, mentions=2))
    settings = {**sizes, "num_validation": 2, "mixes": mixes, **changes}
    return RecordProblem(tokenizer, TRAIN, VALIDATION, **settings)


def bank(size: int, config: NAMMConfig = MEMORY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, config.num_params, generator=generator)


def without_time(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in log]
