"""A model of the caching allocator of PyTorch for CUDA, as far as sizes go: what it keeps reserved.

One stream, blocks above 1 MiB. Rules as in ``c10/cuda/CUDACachingAllocator.cpp``: best fit, the
rest of a block stays a block if it is above 1 MiB, neighbours of one segment merge when free.
Without ``expandable`` a segment is what ``cudaMalloc`` returned for a request; with it, all memory
is one segment that grows at its end.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

MIB = 1 << 20


@dataclass
class Block:
    size: int
    free: bool = False
    before: Block | None = None
    behind: Block | None = None


def rounded(size: int, to: int) -> int:
    return -(-size // to) * to


class CachingAllocator:
    """Bytes ``reserved`` from the driver and ``allocated`` to tensors, now and at most."""

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.reserved = self.allocated = self.peak = 0
        self._free: list[tuple[int, int]] = []  # (size, id), ascending
        self._blocks: dict[int, Block] = {}
        self._end: Block | None = None  # of the one segment, if expandable

    def malloc(self, size: int) -> Block:
        size = rounded(size, 512)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        at = bisect.bisect_left(self._free, (size, 0))
        block = self._take(at) if at < len(self._free) else self._grow(size)
        self._split(block, size)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.behind):
            if other is not None and other.free:
                self._free.remove((other.size, id(other)))
                block = self._join(*((other, block) if other is block.before else (block, other)))
        self._put(block)

    def _grow(self, size: int) -> Block:
        if not self.expandable:
            size = 20 * MIB if size < 10 * MIB else rounded(size, 2 * MIB)
            self.reserved += size
            return Block(size)
        end = self._end
        have = end.size if end is not None and end.free else 0
        more = rounded(size - have, 20 * MIB)
        self.reserved += more
        if end is not None and have:
            self._free.remove((end.size, id(end)))
            end.size, end.free = end.size + more, False
            return end
        self._end = Block(more, before=end)
        if end is not None:
            end.behind = self._end
        return self._end

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest <= (0 if self.expandable else MIB):
            self.allocated += rest  # the block is what counts
            self.peak = max(self.peak, self.allocated)
            return
        other = Block(rest, True, block, block.behind)
        if block.behind is not None:
            block.behind.before = other
        block.size, block.behind = size, other
        if self._end is block:
            self._end = other
        self._put(other)

    def _join(self, first: Block, second: Block) -> Block:
        first.size += second.size
        first.behind = second.behind
        if second.behind is not None:
            second.behind.before = first
        if self._end is second:
            self._end = first
        first.free = True
        return first

    def _put(self, block: Block) -> None:
        self._blocks[id(block)] = block
        bisect.insort(self._free, (block.size, id(block)))

    def _take(self, at: int) -> Block:
        block = self._blocks.pop(self._free.pop(at)[1])
        block.free = False
        return block
