"""Fit memories to a model: head offsets, gate and scorer, by what a second reading attends to."""

from .attention import AttentionFitConfig, fit_attention
from .calibrate import calibrate, calibrate_statistics, calibration_of, targets_of
from .checkpoint import Checkpoint
from .fit import Fit, FitConfig, fit
from .gate import GateFit, fit_gate
from .importance import IMPORTANCE_EPS, Later, LayerReading, Text, read_twice
from .texts import QUESTION_WEIGHT, asked, folder_texts, repeated, training_texts

__all__ = [
    "IMPORTANCE_EPS",
    "QUESTION_WEIGHT",
    "AttentionFitConfig",
    "Checkpoint",
    "Fit",
    "FitConfig",
    "GateFit",
    "Later",
    "LayerReading",
    "Text",
    "asked",
    "calibrate",
    "calibrate_statistics",
    "calibration_of",
    "fit",
    "fit_attention",
    "fit_gate",
    "folder_texts",
    "read_twice",
    "repeated",
    "targets_of",
    "training_texts",
]
