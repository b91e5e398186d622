"""A CUDA graph as far as a CPU can have one: the ops of a step, done again on the same tensors.

Everything that is no op of PyTorch is what it was when the step was recorded: Python does not run,
numbers stay. Unlike CUDA, recording does the work too, so the first replay does nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """``capture`` and ``replay`` as of ``namm_ext.cache.graphs.Graph``."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.done = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [t for t in outs if t.untyped_storage().data_ptr() not in memory]
        if new or function._schema.is_mutable:  # a view needs nothing
            self.ops.append((function, args, kwargs, new))
        return out

    def capture(self, work):
        with self:
            return work()

    def replay(self):
        if not self.done:
            self.done = True
            return
        for function, args, kwargs, old in self.ops:
            out = function(*args, **kwargs)
            for target, value in zip(old, tree_leaves(out), strict=False):
                target.copy_(value)

    @property
    def memory(self) -> list[int]:
        """Addresses of all that the ops read and write."""
        return [
            t.data_ptr()
            for function, args, kwargs, outs in self.ops
            for t in tree_leaves((args, kwargs, outs))
            if isinstance(t, Tensor)
        ]
