"""Fit memories to a model: head offsets, gate and scorer, by what a second reading attends to."""

from .attention import AttentionFitConfig, fit_attention
from .calibrate import calibrate, calibration_of
from .gate import GateFit, fit_gate
from .importance import IMPORTANCE_EPS, Later, LayerReading, Text, read_twice
from .texts import asked, repeated, training_texts

__all__ = [
    "IMPORTANCE_EPS",
    "AttentionFitConfig",
    "GateFit",
    "Later",
    "LayerReading",
    "Text",
    "asked",
    "calibrate",
    "calibration_of",
    "fit_attention",
    "fit_gate",
    "read_twice",
    "repeated",
    "training_texts",
]
