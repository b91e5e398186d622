"""The memory of a model as a transformers ``Cache``.

``NAMMCache`` holds a ``NAMMLayer`` for every full-attention layer and transformers' own layer for
every sliding one. Three facts carry the drop-in:

* ``update`` returns the new keys and values only, and ``get_mask_sizes`` says so, so transformers'
  mask code works unmodified and never meets the difference between tokens seen and tokens kept;
* ``get_seq_length`` is the number of columns seen, never of tokens kept, so position ids stay;
* calls are cut at updates inside the layer, so any way of feeding a sequence gives one result.
"""

from .cache import NAMMCache
from .graphs import graphed
from .layer import NAMMLayer
from .switching import borrow
from .versions import cache_keyword

__all__ = ["NAMMCache", "NAMMLayer", "borrow", "cache_keyword", "graphed"]
