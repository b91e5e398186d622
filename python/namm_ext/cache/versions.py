"""What differs between versions of transformers."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import __version__


def check_version(version: str) -> None:
    """Refuse versions of transformers whose caches and masks have another interface.

    Raises:
        ImportError: before 5.4, where masks and caches are still told ``cache_position``.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < (5, 4):
        raise ImportError(f"namm_ext: transformers must be at least 5.4, got {version}")


def cache_keyword(model: nn.Module) -> str:
    """The argument that hands a cache to ``model``: "cache", before transformers 5.24
    "past_key_values"."""
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


check_version(__version__)
