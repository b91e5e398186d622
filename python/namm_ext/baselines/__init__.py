"""Published eviction rules as policies, on the same ragged store as NAMM.

Every one is ``Name(cache_size=..., n_up=..., budget="per_head" | "per_layer")``, goes wherever a
``NAMM`` goes, and after each update holds at most ``cache_size`` tokens per head (per head on
average with ``"per_layer"``). What differs from the publication stands in each docstring; common
to all: tokens keep their original positions, heads are KV heads, and eviction happens every
``n_up`` tokens (``n_up=1`` is the published pace of H2O, TOVA and StreamingLLM), while a prompt is
read as well as in decoding.
"""

from ._base import Baseline
from .by_attention import H2O, TOVA, SnapKV
from .by_key import KeyDiff, KNorm
from .by_position import Full, NeverEvict, Random, StreamingLLM

__all__ = [
    "H2O",
    "TOVA",
    "Baseline",
    "Full",
    "KNorm",
    "KeyDiff",
    "NeverEvict",
    "Random",
    "SnapKV",
    "StreamingLLM",
]
