"""Settings worth trying on a real model, at most six for each rule.

What is common to all: sinks and some of the newest tokens are protected, and a share of the cache
is what it is tuned for. Scope "global" needs the calibration of the rule on the model.
"""

from __future__ import annotations

from typing import Any

from ..budget import Budget
from ._base import Baseline
from .by_attention import H2O, TOVA, SnapKV
from .by_key import KeyDiff, KNorm, LagKV, NestedKeyDiff
from .by_position import Random, StreamingLLM
from .by_query import ExpectedAttention
from .by_repetition import KVzip


def _tried(
    rule: type[Baseline], *settings: tuple[str, float, dict[str, Any]]
) -> tuple[Baseline, ...]:
    """The rule with each scope, recent fraction and arguments of its own."""
    return tuple(
        rule(Budget(0.25, scope=scope, sink_tokens=4, recent_tokens=recent), **own)
        for scope, recent, own in settings
    )


_ANY_RULE: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("per_head", 0.1, {}),
    ("per_head", 0.25, {}),
    ("per_layer", 0.1, {}),
    ("per_layer", 0.25, {}),
    ("global", 0.1, {}),
    ("global", 0.25, {}),
)

GRID: dict[str, tuple[Baseline, ...]] = {
    "StreamingLLM": (
        StreamingLLM(Budget(0.25, sink_tokens=4)),
        StreamingLLM(Budget(0.25, sink_tokens=16)),
    ),
    "H2O": _tried(
        H2O,
        ("per_head", 0.25, {}),
        ("per_head", 0.5, {}),
        ("per_layer", 0.25, {}),
        ("per_layer", 0.5, {}),
        ("global", 0.1, {}),
        ("global", 0.25, {}),
    ),
    "SnapKV": _tried(
        SnapKV,
        ("per_head", 0.1, {"window": 64}),
        ("per_layer", 0.1, {"window": 64}),
        ("per_layer", 0.25, {"window": 32, "kernel_size": 17}),
        ("global", 0.1, {"window": 32}),
        ("global", 0.1, {"window": 64}),
        ("global", 0.25, {"window": 64, "kernel_size": 17}),
    ),
    "TOVA": _tried(
        TOVA,
        ("per_head", 0.1, {}),
        ("per_head", 0.25, {}),
        ("per_head", 0.25, {"heads": "head"}),
        ("per_layer", 0.25, {"heads": "head"}),
        ("global", 0.1, {"heads": "head"}),
        ("global", 0.25, {"heads": "head"}),
    ),
    "KNorm": _tried(KNorm, *_ANY_RULE),
    "KeyDiff": _tried(KeyDiff, *_ANY_RULE),
    "NestedKeyDiff": _tried(
        NestedKeyDiff,
        ("per_head", 0.1, {}),
        ("per_layer", 0.1, {}),
        ("per_layer", 0.25, {"block": 128, "window": 64}),
        ("global", 0.1, {}),
        ("global", 0.1, {"block": 128, "window": 64}),
        ("global", 0.25, {"block": 32, "window": 16}),
    ),
    "LagKV": _tried(
        LagKV,
        ("per_head", 0.1, {"lag": 16}),
        ("per_head", 0.1, {"lag": 32}),
        ("per_head", 0.1, {"lag": 64}),
        ("per_head", 0.25, {"lag": 128}),
        ("global", 0.1, {"lag": 32}),
        ("global", 0.1, {"lag": 64}),
    ),
    "ExpectedAttention": _tried(
        ExpectedAttention,
        ("per_head", 0.1, {}),
        ("per_layer", 0.1, {}),
        ("per_layer", 0.25, {"epsilon": 0.02}),
        ("global", 0.1, {}),
        ("global", 0.1, {"epsilon": 0.02}),
        ("global", 0.25, {"epsilon": 0.02}),
    ),
    "KVzip": _tried(
        KVzip,
        ("per_layer", 0.1, {}),
        ("global", 0.0, {}),
        ("global", 0.1, {}),
    ),
    "Random": _tried(
        Random,
        ("per_head", 0.1, {}),
        ("per_head", 0.25, {}),
        ("per_head", 0.5, {}),
    ),
}
