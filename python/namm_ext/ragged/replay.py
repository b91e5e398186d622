"""What the queries of a call could see, for layers that read another layer's keys and values.

Such a layer comes when the layer that owns the memory has taken the whole call and may have
forgotten some of what its earlier queries saw. The stores in between are not held: their
positions are, and their rows are found again among those of the first store and of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..transfer import from_host
from ..values import Segments
from .planner import Piece


def attend_piece(
    q: Tensor,
    out: Tensor,
    segments: Segments,
    piece: Piece,
    *,
    softmax_scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of the piece's queries, into their columns of ``out``.

    Args:
        q: ``[B, Hq, L, D]``. out: ``[B, L, Hq, Dv]``.
        segments: the store with the piece's tokens in it.

    Returns:
        The piece's columns of q, and their log-sum-exps.
    """
    if piece.columns is not None and piece.width != q.shape[2]:
        q, out = q[:, :, piece.columns], out[:, piece.columns]
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=real)
    ops.attend_(
        out, lse, q, segments.with_values, piece.first, piece.num_new, piece.pos_first,
        softmax_scale=softmax_scale, softcap=softcap,
    )  # fmt: skip
    if sink_logits is not None:
        _add_sink(out, lse, piece, sink_logits)
    return q, lse


class Replay:
    """The stores that the pieces of one call have met, one after the other.

    Args:
        seen: ``[B]`` tokens of each row before the call.
        lengths: ``[S]`` live rows of each segment before the call.
    """

    def __init__(self, seen: Sequence[int], lengths: Sequence[int]) -> None:
        self._seen, self._lengths = tuple(seen), tuple(lengths)
        # Tokens that came in later stand behind: a store serves all pieces up to its update.
        self._moments: list[tuple[Segments, list[Piece]]] = []
        self._everything: tuple[Segments, Tensor] | None = None

    def saw(self, segments: Segments, piece: Piece) -> None:
        """A piece has been attended to on this store."""
        if self._moments and self._moments[-1][0] is segments:
            self._moments[-1][1].append(piece)
            return
        if len(self._moments) > 1:
            last, pieces = self._moments[-1]
            none = last.k[:0]
            self._moments[-1] = last._replace(k=none, v=last.v[:0], state=last.state[:0]), pieces
        self._moments.append((segments, [piece]))

    @property
    def nbytes(self) -> int:
        """Of keys and values that are held besides the newest store's, as far as is known."""
        held = [segments for segments, _ in self._moments[:-1]]
        held += [] if self._everything is None else [self._everything[0]]
        return sum(segments.k.nbytes + segments.v.nbytes for segments in held)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attention of another layer's queries over what the owner's queries saw.

        Args:
            q: ``[B, Hq, L', D]``, of the newest L' columns of the call.
            k: ``[B, H, L, D]``. v: ``[B, H, L, Dv]``: those of the call, which the owner took in.
            softmax_scale, softcap, sink_logits: of the reading layer.

        Returns:
            ``[B, L', Hq, Dv]``; zero in padding columns.
        """
        missing = k.shape[2] - q.shape[2]
        if missing:
            q = F.pad(q, (0, 0, missing, 0))
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        for segments, pieces in self._moments:
            wanted = [p for p in pieces if p.columns is None or p.columns.stop > missing]
            if not wanted:
                continue
            if not segments.k.shape[0] and segments.capacity:
                segments = self._found_again(segments, k, v)
            for piece in wanted:
                attend_piece(
                    q, out, segments, piece, softmax_scale=softmax_scale, softcap=softcap,
                    sink_logits=sink_logits,
                )  # fmt: skip
        return out[:, missing:]

    def _found_again(self, segments: Segments, k: Tensor, v: Tensor) -> Segments:
        """A store between the first and the last, with the keys and values that it had."""
        if self._everything is None:
            everything = self._gathered(k, v)
            self._everything = everything, _keys(everything)
        everything, keys = self._everything
        rows, _ = segments.live_rows()
        source = torch.searchsorted(keys, _keys(segments))
        found = []
        for tensor in (everything.k, everything.v):
            new = tensor.new_empty(segments.capacity, tensor.shape[1])
            new[rows] = tensor[source]
            found.append(new)
        return segments._replace(k=found[0], v=found[1])

    def _gathered(self, k: Tensor, v: Tensor) -> Segments:
        """What the first store held before the call, and all of the call; no room behind it."""
        first, device = self._moments[0][0], k.device
        pieces = [piece for _, part in self._moments for piece in part]
        heads = len(self._lengths) // len(self._seen)
        new = [now - then for now, then in zip(pieces[-1].seen, self._seen, strict=True)]
        ends = [0, *accumulate(n + new[s // heads] for s, n in enumerate(self._lengths))]
        used = from_host(self._lengths, torch.int32, device)
        everything = ops.compact(
            first._replace(state=first.state[:, :0], seqused_k=used),
            torch.ones(first.capacity, dtype=torch.uint8, device=device),
            used,
            from_host(ends, torch.int32, device),
            capacity=ends[-1],
        )
        for piece in pieces:
            part = slice(None) if piece.columns is None else piece.columns
            columns = (k[:, :, part], v[:, :, part])
            ops.append_(everything, *columns, piece.first, piece.num_new, piece.pos_first)
        return everything


def _keys(segments: Segments) -> Tensor:
    """One increasing number for each live row: its segment, then its position."""
    rows, segment = segments.live_rows()
    return (segment << 32) + segments.pos[rows]


def _add_sink(out: Tensor, lse: Tensor, piece: Piece, sink_logits: Tensor) -> None:
    """What ``out`` and ``lse`` are if one more column of each head takes part in the softmax.

    With the new ``lse``, whoever computes the attention again from it sees the same weights.
    """
    columns = torch.arange(out.shape[1], device=out.device)
    first, stop = piece.first[:, None], (piece.first + piece.num_new)[:, None]
    ours = ((columns >= first) & (columns < stop))[:, None]  # other columns are other pieces'
    total = torch.logaddexp(lse, sink_logits.to(lse)[:, None])
    part = (lse - total).exp().where(ours, 1.0)
    out.mul_(part.transpose(1, 2).unsqueeze(-1))
    lse.copy_(total.where(ours, lse))
