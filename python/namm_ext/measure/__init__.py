"""Memories side by side: the same held-out inputs, the same budget, measured quality, bytes, time.

Every method is a policy on the same ragged store; the full cache is the stock one of transformers.
Quality comes from teacher-forced passes *through* the evicting cache: a context is read as a prompt
is, with an update every ``n_up`` tokens. Bytes are those of live tensors. Time is that of a real
prompt and really generated tokens, all methods taking turns.
"""

from .comparison import Step, Timing, compare, plan
from .costs import measure_costs
from .methods import (
    RULES,
    Method,
    baseline_methods,
    fixed_budget,
    full_method,
    made_ready,
    rule_to_dict,
    tuned_rules,
)
from .results import FULL, Cost, Results, Row, TaskResult, machine, write_json
from .tuning import tune
from .workloads import FAMILIES, ReadingWorkload, RecordWorkload, Workload, bits_per_byte

__all__ = [
    "FAMILIES",
    "FULL",
    "RULES",
    "Cost",
    "Method",
    "ReadingWorkload",
    "RecordWorkload",
    "Results",
    "Row",
    "Step",
    "TaskResult",
    "Timing",
    "Workload",
    "baseline_methods",
    "bits_per_byte",
    "compare",
    "fixed_budget",
    "full_method",
    "machine",
    "made_ready",
    "measure_costs",
    "plan",
    "rule_to_dict",
    "tune",
    "tuned_rules",
    "write_json",
]
