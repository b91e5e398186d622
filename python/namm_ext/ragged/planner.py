"""Where a call is cut: the planner and its pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..transfer import from_host

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Of every row of the batch, the real columns of a call: (first, number) of each run of them.
Runs = tuple[tuple[tuple[int, int], ...], ...]
#: Queries of the previous period that the first spectrogram frame of a period needs.
CARRY = 16


@dataclass(frozen=True, slots=True)
class Due:
    """The update behind a piece."""

    rows: tuple[bool, ...]  # which rows of the batch it is for
    active: Tensor  # the same as [B] bool
    pos_q: Tensor  # [B] int32 position of window row 0
    seen: tuple[int, ...]  # real tokens of each row


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that enter a layer together; no row passes its next update inside a piece.

    Row b brings the columns ``[first[b], first[b] + num_new[b])`` of the call, at positions
    ``pos_first[b] ...``. ``columns`` is set if these are the same columns for every row; then the
    tensors describe the slice, so ``first`` is 0.
    """

    first: Tensor
    num_new: Tensor
    pos_first: Tensor
    columns: slice | None
    width: int
    seen: tuple[int, ...]
    due: Due | None


class Planner:
    """Cuts calls into pieces, row by row, where the rows' own token counts say so and at holes.

    Args:
        n_up: real tokens between two updates of a row.

    Example:
        >>> pieces = Planner(16)((10,), 20, None, torch.device("cpu"))
        >>> [(piece.width, piece.due is not None) for piece in pieces]
        [(6, True), (14, False)]
    """

    def __init__(self, n_up: int) -> None:
        self.n_up = n_up
        self._key: tuple[object, ...] | None = None
        self._pieces: tuple[Piece, ...] = ()
        self._base: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(
        self,
        seen: tuple[int, ...],
        num_cols: int,
        runs: Runs | None,
        device: torch.device,
    ) -> tuple[Piece, ...]:
        """Pieces of one call.

        Args:
            seen: real tokens of each row before the call.
            num_cols: columns of the call, L.
            runs: the real columns of each row; None if all are real.
            device: where the index tensors live.
        """
        key = (seen, num_cols, runs, device)
        if key != self._key:
            self._pieces = tuple(self._cut(seen, num_cols, runs, device))
            self._key = key
        return self._pieces

    def _cut(
        self,
        seen: tuple[int, ...],
        num_cols: int,
        runs: Runs | None,
        device: torch.device,
    ) -> Iterator[Piece]:
        n_up = self.n_up
        whole = ((0, num_cols),) if num_cols else ()
        waiting = [list(row) for row in runs or (whole,) * len(seen)]
        while any(waiting):
            now = [row[0] if row else (0, 0) for row in waiting]
            first, left = [f for f, _ in now], [n for _, n in now]
            num_new = [min(n_up - s % n_up, n) for s, n in zip(seen, left, strict=True)]
            after = tuple(s + n for s, n in zip(seen, num_new, strict=True))
            same_columns = len(set(first)) == len(set(num_new)) == 1
            columns = slice(first[0], first[0] + num_new[0]) if same_columns else None
            yield Piece(
                first=self._tensor((0,) * len(seen) if same_columns else tuple(first), device),
                num_new=self._tensor(tuple(num_new), device),
                pos_first=self._positions(seen, device),
                columns=columns,
                width=num_new[0] if same_columns else num_cols,
                seen=after,
                due=self.due(
                    after,
                    tuple(n > 0 and s % n_up == 0 for s, n in zip(after, num_new, strict=True)),
                    device,
                ),
            )
            for row, f, n, m in zip(waiting, first, left, num_new, strict=True):
                if row:
                    row[:1] = [(f + m, n - m)] if m < n else []
            seen = after

    def due(
        self, seen: tuple[int, ...], rows: tuple[bool, ...], device: torch.device
    ) -> Due | None:
        """The update of ``rows`` after ``seen`` tokens; None if there are no such rows."""
        if not any(rows):
            return None
        pos_q = tuple(
            s - CARRY - (self.n_up if due else s % self.n_up)
            for s, due in zip(seen, rows, strict=True)
        )
        active = from_host(rows, torch.bool, device)
        return Due(rows, active, self._tensor(pos_q, device), seen)

    @staticmethod
    def _tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
        # A fill needs no copy from the host.
        if len(set(values)) == 1:
            return torch.full((len(values),), values[0], dtype=torch.int32, device=device)
        return from_host(values, torch.int32, device)

    def _positions(self, seen: tuple[int, ...], device: torch.device) -> Tensor:
        """As ``_tensor``; rows that all moved by the same step reuse the last tensor."""
        if self._base is not None and self._base[1].device == device:
            values, tensor = self._base
            steps = {s - v for s, v in zip(seen, values, strict=False)}
            if len(values) == len(seen) and len(steps) == 1:
                self._base = (seen, tensor + steps.pop())
                return self._base[1]
        self._base = (seen, self._tensor(seen, device))
        return self._base[1]
