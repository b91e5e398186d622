"""Published eviction rules as policies, on the same ragged store as NAMM.

Every one is ``Name(budget, n_up=...)`` and goes wherever a ``NAMM`` goes, with every
:class:`~namm_ext.Budget`; ``Name(256)`` is the published rule with 256 tokens per head. What
differs from the publication stands in each docstring; common to all: tokens keep their original
positions, heads are KV heads, and eviction happens every ``n_up`` tokens (``n_up=1`` is the
published pace of H2O, TOVA and StreamingLLM), while a prompt is read as well as in decoding.
``KVzip`` is the exception: it reads a context twice and evicts once, at its end.
"""

from ._base import Baseline
from .by_attention import H2O, TOVA, SnapKV
from .by_key import KeyDiff, KNorm, LagKV, NestedKeyDiff
from .by_position import Full, NeverEvict, Random, StreamingLLM
from .by_query import ExpectedAttention
from .by_repetition import KVzip

__all__ = [
    "H2O",
    "TOVA",
    "Baseline",
    "ExpectedAttention",
    "Full",
    "KNorm",
    "KVzip",
    "KeyDiff",
    "LagKV",
    "NestedKeyDiff",
    "NeverEvict",
    "Random",
    "SnapKV",
    "StreamingLLM",
]
