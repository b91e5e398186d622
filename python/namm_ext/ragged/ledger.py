"""What the stores of a model hold, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """Bytes held now and at most, of keys and values (``kv``) and of everything else (``memory``).

    A ledger with a parent reports to it too, so that the peak of a model is the true one and not
    the sum of its layers' peaks.
    """

    def __init__(self, parent: Ledger | None = None) -> None:
        self.parent = parent
        self.kv = self.memory = self.peak_kv = self.peak_memory = self.peak = 0

    def add(self, kv: int, memory: int) -> None:
        """Account for bytes allocated (or freed, if negative)."""
        self.kv += kv
        self.memory += memory
        self.peak_kv = max(self.peak_kv, self.kv)
        self.peak_memory = max(self.peak_memory, self.memory)
        self.peak = max(self.peak, self.kv + self.memory)
        if self.parent is not None:
            self.parent.add(kv, memory)

    @contextmanager
    def holding(self, memory: int) -> Iterator[None]:
        """Bytes that are there within the block."""
        self.add(0, memory)
        try:
            yield
        finally:
            self.add(0, -memory)

    def replace(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Account for ``(kv, memory)`` bytes that replaced others which are gone already."""
        self.add(new[0] - old[0], new[1] - old[1])
