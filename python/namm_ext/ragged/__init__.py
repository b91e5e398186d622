"""Storage of one attention layer: ragged, exactly sized, rebuilt at every update.

A segment is one (batch row, KV head) pair, ``s = b * num_kv_heads + h``. All per-token tensors of
a layer are flat; segment s owns the rows ``[cu_seqlens_k[s], cu_seqlens_k[s + 1])``::

    k [C, D]  v [C, Dv]  pos [C] int32  state [C, F] float32
    kept tokens | tokens since the last update | free           slot = kept + n_up, exactly

``n_up`` new tokens are exactly what can arrive before the next update, so appending never
reallocates and an update always does: what a policy drops goes back to the allocator at once.

The host knows every length without asking the device: row b updates when its own count of real
tokens is a multiple of ``n_up``, so ``kept`` (set by updates) and ``seen`` say everything, and
decoding needs no synchronisation. ``Planner`` turns a call into pieces that end at updates; all
layers of a model ask the same question, so it remembers its last answer.
"""

from .files import from_tensors, to_tensors
from .ledger import Ledger
from .planner import CARRY, Due, Piece, Planner, Runs
from .replay import Replay
from .store import ROLLBACK_TOKENS, RaggedKV
from .together import update_together
from .undo import Store, lasting

__all__ = [
    "CARRY",
    "ROLLBACK_TOKENS",
    "Due",
    "Ledger",
    "Piece",
    "Planner",
    "RaggedKV",
    "Replay",
    "Runs",
    "Store",
    "from_tensors",
    "lasting",
    "to_tensors",
    "update_together",
]
