"""Which model a policy was made for: a memory is worth less on another that it was not made ready
for, and that is said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

#: What tells models apart; all checkpoints of one shape count as the same.
FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)

_said: set[tuple[str, str]] = set()


def shape_of(config: Any) -> dict[str, Any]:
    """``FIELDS`` of a decoder's configuration; what it does not have is left out.

    Example:
        >>> from transformers import LlamaConfig
        >>> shape_of(LlamaConfig(num_hidden_layers=2))["num_hidden_layers"]
        2
    """
    found = {name: getattr(config, name, None) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def say_if_foreign(policy: Any, config: Any) -> None:
    """Warn if a policy was made for a model of another shape; once for two shapes."""
    made_for = policy.made_for
    if made_for is None or made_for == (shape := shape_of(config)):
        return
    known = _text(made_for), _text(shape)
    if known in _said:
        return
    _said.add(known)
    warnings.warn(
        f"NAMMCache: the memory was made for another model ({known[0]}) than this one "
        f"({known[1]}), so it may forget what counts; `namm calibrate MODEL DIR --policy ...`, "
        "or namm_ext.fitting.calibrate, makes it ready",
        stacklevel=3,
    )


def _text(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
