"""A layer as one opaque op for torch.compile.

Traced code cannot follow the host's books, so a compiled layer is one op. Its handle is a CPU
tensor: an int would be baked into the graph and every new cache would recompile.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles = itertools.count(1)  # atomic: threads make caches at the same time


def register(layer: Any) -> Tensor:
    """A handle by which the op finds ``layer`` as long as it lives."""
    handle = next(_handles)
    _LAYERS[handle] = layer
    return torch.tensor(handle)


# The op changes what the handle stands for. Were it declared to change nothing, the compiler might
# drop a call whose result is unused, run equal calls once, or put them in another order.
@torch.library.custom_op("namm_ext::layer_forward", mutates_args={"handle"})
def layer_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    handle: Tensor,
    softmax_scale: float,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    reader: int = -1,
) -> Tensor:
    """``NAMMLayer.forward`` of the layer behind ``handle``, or its ``read``, opaque."""
    layer = _LAYERS[int(handle)]
    if reader >= 0:
        return layer.read(reader, query, key, value, softmax_scale, sink_logits, softcap)
    return layer.forward(query, key, value, attention_mask, softmax_scale, sink_logits, softcap)


@layer_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    handle: Tensor,
    softmax_scale: float,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    reader: int = -1,
) -> Tensor:
    head_dim_v = value.shape[3] or key.shape[3]
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], head_dim_v)
