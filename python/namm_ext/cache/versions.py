"""What differs between versions of transformers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import __version__
from transformers.cache_utils import DynamicSlidingWindowLayer


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


#: Of transformers, what decides: major and minor.
VERSION = _numbers(__version__)


def check_version(version: str) -> None:
    """Refuse versions of transformers whose caches and masks have another interface.

    Raises:
        ImportError: before 5.4, where masks and caches are still told ``cache_position``.
    """
    if _numbers(version) < (5, 4):
        raise ImportError(f"namm_ext: transformers must be at least 5.4, got {version}")


def cache_keyword(model: nn.Module) -> str:
    """The argument that hands a cache to ``model``: "cache", before transformers 5.24
    "past_key_values"."""
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def rereads(seen: int) -> str:
    """What to add to an error about masks where ``generate`` itself may have made the wrong one.

    Args:
        seen: columns that the cache has.
    """
    if not seen or VERSION >= (5, 20):
        return ""
    return (
        f"; with prefill_chunk_size, generate of transformers {__version__} reads what the cache "
        "has seen once more: leave it out for this turn, or upgrade to 5.20"
    )


class _RecordingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that can go back behind its window, as they all can from 5.24 on."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            self.keys, self.values = keys, values
        # Generate crops only what it drafted in vain.
        visible = slice(1 - self.sliding_window - key_states.shape[-2], None)
        return keys[..., visible, :], values[..., visible, :]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens and what was only recorded."""
        assert self.keys is not None
        assert self.values is not None
        self.cumulative_length += tokens_to_remove
        stop = self.keys.shape[-2] + tokens_to_remove
        kept = slice(max(stop - self.sliding_window + 1, 0), stop)
        self.keys, self.values = self.keys[..., kept, :], self.values[..., kept, :]


def recording(layer: Any) -> Any:
    """A new sliding layer of transformers, able to record its past over several calls.

    That of 5.14 cannot, that of 5.17 shows attention more than its mask is for.
    """
    if type(layer) is not DynamicSlidingWindowLayer or VERSION >= (5, 24):
        return layer
    return _RecordingLayer(layer.sliding_window)


check_version(__version__)
