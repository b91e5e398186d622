"""Evolution of memories: problems, population evaluation, CMA-ES search, resumable runs."""

from .evaluate import Context, Evaluation, evaluate_policy, evaluate_population, read
from .imitate import ImitateConfig, imitate
from .own_data import JsonlProblem, TextProblem
from .problem import PlainContext, Problem, SizedProblem, length_of
from .readings import Population, ReadingProblem
from .records import RecordProblem
from .search import DiagonalCMA
from .train import EvolveConfig, EvolveResult, calibrate_statistics, evolve

__all__ = [
    "Context",
    "DiagonalCMA",
    "Evaluation",
    "EvolveConfig",
    "EvolveResult",
    "ImitateConfig",
    "JsonlProblem",
    "PlainContext",
    "Population",
    "Problem",
    "ReadingProblem",
    "RecordProblem",
    "SizedProblem",
    "TextProblem",
    "calibrate_statistics",
    "evaluate_policy",
    "evaluate_population",
    "evolve",
    "imitate",
    "length_of",
    "read",
]
