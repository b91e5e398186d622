"""Evolved KV-cache memory (NAMM) as fused ops for PyTorch, with a drop-in for Hugging Face models.

``import namm_ext`` loads the ops (``torch.ops.namm_ext.*``) and changes nothing else; transformers
is imported when a name that needs it is used first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import ops, reference
from ._library import libraries
from .values import Segments, Window

if TYPE_CHECKING:
    from . import baselines
    from .asking import ask
    from .budget import Budget
    from .cache import NAMMCache, graphed
    from .config import NAMMConfig
    from .patching import apply, patch, remove
    from .policy import NAMM, Calibration, Policy, UpdateContext

__version__ = libraries.build_info["version"]

# Where each public name lives; imported at first use.
_LAZY = {
    "Budget": "budget",
    "Calibration": "policy",
    "NAMM": "policy",
    "NAMMCache": "cache",
    "NAMMConfig": "config",
    "Policy": "policy",
    "UpdateContext": "policy",
    "apply": "patching",
    "ask": "asking",
    "graphed": "cache",
    "patch": "patching",
    "remove": "patching",
}
_LAZY_MODULES = ("baselines", "evolution", "tasks", "testing", "zoo")

__all__ = [
    "NAMM",
    "Budget",
    "Calibration",
    "NAMMCache",
    "NAMMConfig",
    "Policy",
    "Segments",
    "UpdateContext",
    "Window",
    "__version__",
    "apply",
    "ask",
    "baselines",
    "graphed",
    "ops",
    "patch",
    "reference",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
