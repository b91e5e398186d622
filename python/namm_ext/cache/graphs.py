"""Decoding as one CUDA graph from an update of the memory to the next.

Between two updates nothing of a memory moves: an update leaves room for the tokens of a period, the
kernels find rows and window from lengths and positions on the device, and no grid depends on them.
So a step that was captured once serves all tokens up to the next update.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..ragged import Piece
from ..transfer import from_host
from .cache import NAMMCache
from .versions import cache_keyword


class Graph(Protocol):
    """Work that was recorded once and can be done again."""

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record what ``work`` enqueues; returns the tensor that a replay fills."""

    def replay(self) -> None:
        """Do it."""


class CudaGraph:
    """A ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record what ``work`` enqueues; nothing runs yet."""
        with torch.cuda.graph(self.graph):
            return work()

    def replay(self) -> None:
        """Enqueue it."""
        self.graph.replay()


def graphed(
    model: PreTrainedModel, cache: NAMMCache, *, make_graph: Callable[[], Graph] = CudaGraph
) -> Graphed:
    """A function that feeds a model one token per row and replays a CUDA graph where it can.

    Its first token and each token that ends a period run as usual, the one behind them is captured,
    all others are a replay: no Python of the model and no launches one by one.

    Args:
        model: of transformers, on a CUDA device.
        cache: of the model, that has read a prompt. Between calls it may be used in any other way.
        make_graph: makes what records and replays a step.

    Raises:
        ValueError: if layers of the model keep a stock cache, whose tensors move at each token.

    Example::

        cache = NAMMCache(model, policy)
        logits = model(ids, cache=cache).logits[:, -1]
        step = namm_ext.graphed(model, cache)
        for _ in range(100):
            logits = step(logits.argmax(-1, keepdim=True))
    """
    if cache.session.sliding or cache.session.recurrent.layers:
        raise ValueError(
            "graphed: every layer of the model must have a memory; sliding and recurrent layers "
            "keep a stock cache, whose tensors move at each token"
        )
    return Graphed(model, cache, make_graph)


class Graphed:
    """What ``graphed`` returns."""

    def __init__(
        self, model: PreTrainedModel, cache: NAMMCache, make_graph: Callable[[], Graph]
    ) -> None:
        self.model, self.cache, self.make_graph = model, cache, make_graph
        self._keyword = cache_keyword(model)
        self._layers = cache.memory_layers
        self._warm = False  # a kernel is loaded by its first launch, which must not be captured
        self._graph: Graph | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Feed a token to every row.

        Args:
            ids: ``[B, 1]``.

        Returns:
            ``[B, vocabulary]`` logits; of a replay they are overwritten by the next one.

        Raises:
            ValueError: if the cache has read nothing, or ``ids`` are not one token for each row.
        """
        seen = self._seen()
        if ids.shape != (len(seen), 1):
            raise ValueError(f"graphed: ids must be [{len(seen)}, 1], got {list(ids.shape)}")
        n_up = self.cache.policy.n_up
        if not self._warm or any((n + 1) % n_up == 0 for n in seen):
            self._warm, self._graph = True, None  # an update moves what was captured
            return self._run(ids, from_host(seen, torch.int32, ids.device), self._mask())
        if self._graph is None or not self._is_where_it_was():
            graph = self._capture(ids, seen)
        else:
            graph = self._graph
            self._ids.copy_(ids)
            self._advance(seen)
        graph.replay()
        self._graph, self._length = graph, self.cache.session.length
        return self._logits

    def _seen(self) -> tuple[int, ...]:
        """Tokens of each row, after a call that failed too."""
        first = self._layers[0]
        if first.padded != self.cache.session.length:
            self.cache.settle()
        if first.kv is None:
            raise ValueError("graphed: the cache must have read a prompt, got an empty one")
        return first.kv.seen

    def _is_where_it_was(self) -> bool:
        """Whether nothing but this has worked on the cache since the last replay."""
        kv = self._layers[0].kv
        assert kv is not None
        same = kv.store.segments.seqused_k is self._seqused_k()  # another one after any undo
        return same and self._length == self.cache.session.length

    def _mask(self) -> Tensor | None:
        """``[B, tokens with the new one]``, None where there was no padding."""
        mask = self.cache.session.past_mask
        return None if mask is None else F.pad(mask, (0, 1), value=True)

    def _run(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """One call of the model."""
        out = self.model(
            ids, attention_mask=mask, position_ids=positions.long()[:, None], use_cache=True,
            **{self._keyword: self.cache},
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits[:, -1]

    def _capture(self, ids: Tensor, seen: tuple[int, ...]) -> Graph:
        self._graph = None  # its memory first
        kv = self._layers[0].kv
        assert kv is not None
        self._seqused_k = weakref.ref(kv.store.segments.seqused_k)
        self._ids = ids.clone()
        self._positions = from_host(seen, torch.int32, ids.device)
        piece = Piece(
            first=torch.zeros_like(self._positions),
            num_new=torch.ones_like(self._positions),
            pos_first=self._positions,
            columns=slice(0, 1),
            width=1,
            seen=tuple(n + 1 for n in seen),
            due=None,
        )
        mask = self._mask()  # later ones differ in columns of text alone, which nobody reads
        graph = self.make_graph()

        def step() -> Tensor:
            logits = self._run(self._ids, self._positions, mask)
            self._positions.add_(1)
            return logits

        with self._planned(piece):
            self._logits = graph.capture(step)
        return graph

    @contextmanager
    def _planned(self, piece: Piece) -> Iterator[None]:
        """All layers take the one piece, whose positions the device advances."""
        session = self.cache.session
        planner, session.planner = session.planner, lambda *_: (piece,)
        try:
            yield
        finally:
            session.planner = planner

    def _advance(self, seen: tuple[int, ...]) -> None:
        """The host's books of a replay."""
        after = tuple(n + 1 for n in seen)
        self.cache.session.advance()
        for layer in self._layers:
            layer.advance(after)
