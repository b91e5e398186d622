"""What decides which tokens stay: the interface of every eviction policy, and NAMM itself."""

from .base import Policy, UpdateContext, check_num_kept
from .files import bundled_policies
from .namm import NAMM
from .original import ReferenceCheckpoint, read_reference_checkpoint
from .statistics import StatisticsCalibrator, StatisticsCollector, calibrate_threshold

__all__ = [
    "NAMM",
    "Policy",
    "ReferenceCheckpoint",
    "StatisticsCalibrator",
    "StatisticsCollector",
    "UpdateContext",
    "bundled_policies",
    "calibrate_threshold",
    "check_num_kept",
    "read_reference_checkpoint",
]
