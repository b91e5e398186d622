"""What decides which tokens stay: the interface of every eviction policy, and NAMM itself."""

from .base import Policy, UpdateContext, check_num_kept
from .calibration import Calibration, regress
from .files import bundled_policies
from .gate import Gate
from .namm import NAMM
from .original import OriginalCheckpoint, read_original_checkpoint
from .statistics import StatisticsCalibrator, StatisticsCollector, calibrate_threshold

__all__ = [
    "NAMM",
    "Calibration",
    "Gate",
    "OriginalCheckpoint",
    "Policy",
    "StatisticsCalibrator",
    "StatisticsCollector",
    "UpdateContext",
    "bundled_policies",
    "calibrate_threshold",
    "check_num_kept",
    "read_original_checkpoint",
    "regress",
]
