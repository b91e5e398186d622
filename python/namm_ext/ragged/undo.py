"""States that a store was in, and stores put together from rows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from .. import ops
from ..transfer import from_host
from ..values import Segments
from .planner import CARRY

#: Log-sum-exp of a query that counts no more: its attention is zero wherever it is computed again.
SILENT = 1e30

F = TypeVar("F", bound=Callable[..., object])


def lasting(function: F) -> F:
    """What is allocated in here can be written to later, in inference mode and out of it."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass(frozen=True, slots=True)
class Store:
    """The tensors that an update replaces, and the host's knowledge about them."""

    segments: Segments
    slots: tuple[int, ...]  # rows of each segment's slot, room included
    kept: tuple[int, ...]  # survivors of the last update of each segment

    @property
    def kv_bytes(self) -> int:
        return self.segments.k.nbytes + self.segments.v.nbytes

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.segments) - self.kv_bytes


@dataclass(frozen=True, slots=True)
class Version:
    """A layer at one moment: its store, its windows, and where each row of the batch stood.

    ``due`` are the rows whose update comes next, with all ``n_up`` tokens of their period.
    """

    store: Store
    q_window: Tensor
    lse_window: Tensor
    seen: tuple[int, ...]
    due: tuple[bool, ...]

    @property
    def kv_bytes(self) -> int:
        return self.store.kv_bytes

    @property
    def memory_bytes(self) -> int:
        return self.store.memory_bytes + self.q_window.nbytes + self.lse_window.nbytes

    def since(self, row: int, n_up: int) -> int:
        """Tokens of a row since its last update."""
        return n_up if self.due[row] else self.seen[row] % n_up


def choose(
    versions: Sequence[Version], row: int, wanted: int, n_up: int
) -> tuple[Version, int] | None:
    """The version that a row has to go back to, and how many of its tokens to drop.

    Args:
        versions: recorded before updates, oldest first, and the present one.
        row: of the batch.
        wanted: tokens that it shall have seen.

    Returns:
        None if it would need an update undone that was not recorded.
    """
    undone = (v for v in versions[:-1] if v.due[row] and wanted < v.seen[row])
    version = next(undone, versions[-1])
    drop = version.seen[row] - wanted
    return (version, drop) if 0 <= drop <= version.since(row, n_up) else None


def gather(
    sources: Sequence[tuple[Version, int]], num_kv_heads: int, n_up: int, dropped: Sequence[int]
) -> Version:
    """The batch whose row i is a row of a version, without its newest ``dropped[i]`` tokens.

    Takes a version's tensors as they are where every row is from its own place.
    """
    first = sources[0][0]
    seen = tuple(v.seen[b] - drop for (v, b), drop in zip(sources, dropped, strict=True))
    due = tuple(v.due[b] and not drop for (v, b), drop in zip(sources, dropped, strict=True))
    segments = [(v, b * num_kv_heads + h) for v, b in sources for h in range(num_kv_heads)]
    kept = tuple(v.store.kept[s] for v, s in segments)
    since = [v.since(b, n_up) - drop for (v, b), drop in zip(sources, dropped, strict=True)]
    # From the host's books: the device may be ahead after a call that failed.
    used = [n + since[i // num_kv_heads] for i, n in enumerate(kept)]
    device = first.store.segments.k.device
    seqused_k = from_host(used, torch.int32, device)
    if all(v is first and b == i for i, (v, b) in enumerate(sources)) and len(sources) == len(
        first.seen
    ):
        store = Store(first.store.segments._replace(seqused_k=seqused_k), first.store.slots, kept)
        return Version(store, first.q_window, first.lse_window, seen, due)

    ends = {id(v): [0, *accumulate(v.store.slots)] for v, _ in sources}
    spans = [
        (v, slice(ends[id(v)][b * num_kv_heads], ends[id(v)][(b + 1) * num_kv_heads]))
        for v, b in sources
    ]
    slots = tuple(v.store.slots[s] for v, s in segments)
    cu_seqlens_k = from_host([0, *accumulate(slots)], torch.int32, device)
    tokens = (
        torch.cat([v.store.segments[i][rows] for v, rows in spans])
        for i in range(len(first.store.segments.tokens))
    )
    q_window = torch.stack([v.q_window[b] for v, b in sources])
    lse_window = torch.stack([v.lse_window[b] for v, b in sources])
    store = Store(Segments._make((*tokens, cu_seqlens_k, seqused_k)), slots, kept)
    return Version(store, q_window, lse_window, seen, due)


def without_tails(
    version: Version, num_kv_heads: int, n_up: int, ends: Sequence[int | None]
) -> Version:
    """A version, at the end of a period of some rows, without what came behind their ends.

    Args:
        version: what is there.
        ends: tokens of each row up to its end; None for rows that stay as they are.
    """
    old = version.store
    rows, segment = old.segments.live_rows()
    device = rows.device
    limits = [2**31 - 1 if end is None else end for end in ends for _ in range(num_kv_heads)]
    stays = old.segments.pos[rows] < from_host(limits, torch.int64, device)[segment]
    keep = torch.zeros(old.segments.capacity, dtype=torch.uint8, device=device)
    keep[rows] = stays.to(torch.uint8)
    num_kept = torch.zeros_like(old.segments.seqused_k)
    num_kept.index_add_(0, segment, stays.to(torch.int32))
    counts = num_kept.tolist()
    kept = tuple(
        n if ends[s // num_kv_heads] is None else counts[s] for s, n in enumerate(old.kept)
    )
    slots = tuple(n + n_up for n in kept)
    total = [0, *accumulate(slots)]
    cu_seqlens_k = from_host(total, torch.int32, device)
    segments = ops.compact(old.segments, keep, num_kept, cu_seqlens_k, capacity=total[-1])
    # The queries behind an end must not count in the next update.
    lse_window = version.lse_window.clone()
    for row, end in enumerate(ends):
        if end is not None:
            lse_window[row, :, max(CARRY - version.seen[row] + end, 0) : CARRY] = SILENT
    store = Store(segments, slots, kept)
    return Version(store, version.q_window, lse_window, version.seen, version.due)
