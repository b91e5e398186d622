"""The store of one layer: append, attend, update; undo and rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..policy import Policy, UpdateContext, check_num_kept
from ..transfer import from_host
from ..values import Segments, Window
from .ledger import Ledger
from .planner import CARRY, Due, Piece, Planner
from .replay import Replay, attend_piece
from .undo import Store, Version, choose, gather, lasting, without_tails

#: A draft of up to this many tokens can be undone while ``recording``.
ROLLBACK_TOKENS = 128


_KEEPS_ALL = Policy()  # without a limit


class Decision(NamedTuple):
    """What an update has decided and not yet done."""

    due: Due
    context: UpdateContext
    scores: Tensor
    state: Tensor
    keep: Tensor
    num_kept: Tensor

    @property
    def transient_bytes(self) -> int:
        """Bytes that it holds besides the store."""
        own = () if self.state is self.context.segments.state else (self.state,)
        return sum(tensor.nbytes for tensor in (self.scores, self.keep, *own))


class Cropped(NamedTuple):
    """What a crop leads to, and how many updates it undoes."""

    version: Version
    undone: int


class RaggedKV:
    """Keys, values, positions and policy state of one layer, for every row and KV head.

    ``forward`` is the whole life of a call: append, attend, update, piece by piece. The result
    does not depend on how a sequence is cut into calls.

    Args:
        policy: decides what stays; on the device of the store.
        batch_size, num_kv_heads, num_heads, head_dim, head_dim_v: sizes; ``num_heads`` counts
            query heads, a multiple of ``num_kv_heads``; ``head_dim_v`` is 0 where keys are values
            too.
        softmax_scale: factor on ``q k^T``.
        softcap: bound of the logits, 0 for none.
        dtype: of k, v and q. State and log-sum-exps are float32, or float64 with float64.
        device: of everything.
        layer_idx: for error messages and for policies that treat layers differently.
        param_index: ``[B]`` int32, the row of a parameter bank each batch row uses; default 0.
        ledger: where to account for memory.
        num_layers: that share a budget in bytes.

    Guarantees: every slot is ``kept + n_up`` rows long; an update is computed out of place and
    committed once, so a policy that raises leaves the store as it was and the update is made up
    for by the next call.
    """

    @lasting
    def __init__(
        self,
        policy: Policy,
        *,
        batch_size: int,
        num_kv_heads: int,
        num_heads: int,
        head_dim: int,
        head_dim_v: int,
        softmax_scale: float,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layer_idx: int = 0,
        param_index: Tensor | None = None,
        ledger: Ledger | None = None,
        num_layers: int = 1,
        softcap: float = 0.0,
    ) -> None:
        device = torch.device(device)
        self.policy = policy
        self.n_up = policy.n_up
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.layer_idx = layer_idx
        self.param_index = (
            torch.zeros(batch_size, dtype=torch.int32, device=device)
            if param_index is None
            else param_index.to(device=device, dtype=torch.int32)
        )
        self.seen: tuple[int, ...] = (0,) * batch_size
        self.num_updates = 0
        self.recording = False
        self.ledger = Ledger(ledger)
        self._past: list[Version] = []  # before updates, oldest first, while recording
        self._before = self.seen  # at the last mark
        self._torn = False  # in the middle of committing an update
        self.overdue: Due | None = None  # an update that failed or has yet to run

        num_segments = batch_size * num_kv_heads
        capacity = num_segments * self.n_up
        real = torch.float64 if dtype == torch.float64 else torch.float32
        int32: Any = {"dtype": torch.int32, "device": device}
        segments = Segments(
            k=torch.empty(capacity, head_dim, dtype=dtype, device=device),
            v=torch.empty(capacity, head_dim_v, dtype=dtype, device=device),
            pos=torch.empty(capacity, **int32),
            state=torch.empty(capacity, policy.num_state, dtype=real, device=device),
            cu_seqlens_k=torch.arange(0, capacity + 1, self.n_up, **int32),
            seqused_k=torch.zeros(num_segments, **int32),
        )
        self.store = Store(segments, (self.n_up,) * num_segments, (0,) * num_segments)
        rows = CARRY + self.n_up if getattr(policy, "needs_window", True) else 0
        self.q_window = torch.zeros(
            batch_size, num_heads, rows, head_dim, dtype=dtype, device=device
        )
        self.lse_window = torch.zeros(batch_size, num_heads, rows, dtype=real, device=device)
        self.ledger.add(*self.held)
        self.evicts = True
        if isinstance(policy.budget.size, str):
            # As it is now, each head has room for the tokens of a period.
            row = self.store.kv_bytes // capacity + 4 + real.itemsize * policy.num_state
            budget = policy.budget.in_tokens(
                fixed=num_layers * -(-sum(self.held) // batch_size),
                per_token=num_layers * num_kv_heads * row,
            )
            self.policy = policy.with_budget(budget)

    # Sizes ---------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Live rows of every segment, from the host's own books."""
        since = [
            self.n_up if due else s % self.n_up
            for s, due in zip(self.seen, self.overdue_rows, strict=True)
        ]
        return tuple(n + since[s // self.num_kv_heads] for s, n in enumerate(self.store.kept))

    @property
    def overdue_rows(self) -> tuple[bool, ...]:
        """``[B]`` rows whose update failed or has yet to run."""
        return (False,) * self.batch_size if self.overdue is None else self.overdue.rows

    # A call --------------------------------------------------------------------------------------

    def mark(self) -> None:
        """What comes in from here on can be taken back by ``roll_back``."""
        self._before = self.seen

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pieces: Sequence[Piece],
        sink_logits: Tensor | None = None,
        *,
        leave_last: bool = False,
        replay: Replay | None = None,
    ) -> Tensor:
        """Take in new tokens and attend to what the layer remembers.

        Args:
            q: ``[B, Hq, L, D]`` after RoPE. k: ``[B, H, L, D]``. v: ``[B, H, L, Dv]``.
            pieces: of a ``Planner`` for ``seen`` and L.
            sink_logits: ``[Hq]``, the logit of a column of each query head that takes its part of
                the attention and has no value (GPT-OSS).
            leave_last: leave an update behind the last piece ``overdue``, for the caller to make.
            replay: to be told what the queries of each piece could see.

        Returns:
            ``[B, L, Hq, Dv or D]``; zero in padding columns.
        """
        if self.overdue is not None:
            self.update(self.overdue)
        shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3] or k.shape[3])
        dense = sum(p.width for p in pieces if p.columns is not None) == q.shape[2]
        out = q.new_empty(shape) if dense else q.new_zeros(shape)
        for piece in pieces:
            self.append(k, v, piece)
            self.attend(q, out, piece, sink_logits)
            if replay is not None:
                replay.saw(self.store.segments, piece)
            if piece.due is not None and not (leave_last and piece is pieces[-1]):
                self.update(piece.due)
        return out

    def append(self, k: Tensor, v: Tensor, piece: Piece) -> None:
        """Put the piece's tokens behind the live rows of their segments."""
        if piece.columns is not None and piece.width != k.shape[2]:
            k, v = k[:, :, piece.columns], v[:, :, piece.columns]
        ops.append_(self.store.segments, k, v, piece.first, piece.num_new, piece.pos_first)
        self.seen = piece.seen
        self.overdue = piece.due

    def attend(
        self, q: Tensor, out: Tensor, piece: Piece, sink_logits: Tensor | None = None
    ) -> None:
        """Attention of the piece's queries, into their columns of ``out``; fills the windows."""
        q, lse = attend_piece(
            q, out, self.store.segments, piece, softmax_scale=self.softmax_scale,
            softcap=self.softcap, sink_logits=sink_logits,
        )  # fmt: skip
        if self.q_window.shape[2]:
            ops.record_(
                self.q_window, self.lse_window, q, lse, piece.first, piece.num_new, piece.pos_first
            )

    @lasting
    def update(self, due: Due) -> None:
        """Let the policy decide for the rows that are due, and build the new store.

        Raises:
            ValueError: if the policy's scores are NaN, naming layer, row and head. The store is
                then as it was before the call, as with any other failure.
        """
        decision = self.decide(due)
        counts = check_num_kept(decision.num_kept, decision.context)
        with self.ledger.holding(decision.transient_bytes):
            self.renew(decision, counts)

    @lasting
    def decide(self, due: Due) -> Decision:
        """What stays of the rows that are due, known to the device alone."""
        segments = self.store.segments
        context = UpdateContext(
            segments=segments.with_values,
            window=Window(self.q_window, self.lse_window, due.pos_q, due.active),
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            layer_idx=self.layer_idx,
            num_kv_heads=self.num_kv_heads,
            param_index=self.param_index,
            seen=due.seen,
            due=due.rows,
        )
        scores, state = self.policy.update(context)
        decides = self.policy if self.evicts else _KEEPS_ALL
        keep, num_kept = decides.select(scores, context)
        return Decision(due, context, scores, state, keep, num_kept)

    @lasting
    def renew(self, decision: Decision, counts: Sequence[int]) -> None:
        """Build the new store of a decision.

        Args:
            decision: of ``decide``; nothing came in since.
            counts: ``decision.num_kept``, as the host reads it.
        """
        old, due, keep = self.store, decision.due, decision.keep
        kept = tuple(
            n if due.rows[s // self.num_kv_heads] else old.kept[s] for s, n in enumerate(counts)
        )
        slots = tuple(n + self.n_up for n in kept)
        ends = [0, *accumulate(slots)]
        cu_seqlens_k = from_host(ends, torch.int32, keep.device)
        scored = old.segments._replace(state=decision.state)
        compacted = ops.compact(scored, keep, decision.num_kept, cu_seqlens_k, capacity=ends[-1])
        new = Store(compacted, slots, kept)
        self.ledger.add(new.kv_bytes, new.memory_bytes)
        self._commit(new, due)

    def _commit(self, new: Store, due: Due) -> None:
        q_window, lse_window = self.q_window, self.lse_window
        self._torn = True
        if self.recording:
            # The old store's bytes stay on the ledger.
            self._past.append(Version(self.store, q_window, lse_window, self.seen, due.rows))
            q_window, lse_window = q_window.clone(), lse_window.clone()
            self.ledger.add(0, q_window.nbytes + lse_window.nbytes)
            while not self._is_near(self._past[0]):
                self._forget(self._past.pop(0))
        else:
            self.ledger.add(-self.store.kv_bytes, -self.store.memory_bytes)
        if q_window.shape[2]:
            for window in (q_window, lse_window):
                head, tail = window[:, :, :CARRY], window[:, :, self.n_up :]
                if not all(due.rows):
                    active = due.active.view(-1, *[1] * (window.dim() - 1))
                    tail = torch.where(active, tail, head)
                # Rows overlap if n_up < CARRY.
                head.copy_(tail.clone() if self.n_up < CARRY else tail)
        self.store, self.q_window, self.lse_window = new, q_window, lse_window
        self.overdue = None
        self.num_updates += 1
        self._torn = False

    # Undo ----------------------------------------------------------------------------------------

    def _is_near(self, version: Version) -> bool:
        """Whether undoing ``ROLLBACK_TOKENS`` of some row takes its update back."""
        return any(
            due and now - then < ROLLBACK_TOKENS
            for due, now, then in zip(version.due, self.seen, version.seen, strict=True)
        )

    def _forget(self, version: Version) -> None:
        self.ledger.add(-version.kv_bytes, -version.memory_bytes)

    def forget_past(self) -> None:
        """Drop what was recorded for undoing updates."""
        while self._past:
            self._forget(self._past.pop())

    @property
    def recorded_bytes(self) -> int:
        """Bytes of everything that is only there for undoing updates."""
        return sum(version.kv_bytes + version.memory_bytes for version in self._past)

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of (keys and values, everything else), the recorded past aside."""
        now = self._now
        return now.kv_bytes, now.memory_bytes

    @property
    def _now(self) -> Version:
        return Version(self.store, self.q_window, self.lse_window, self.seen, self.overdue_rows)

    @lasting
    def cropped(self, removed: Sequence[int]) -> Cropped:
        """What the layer is without the last ``removed[b]`` real tokens of every row, exactly as
        if never seen; nothing changes before ``restore``.

        Raises:
            RuntimeError: if an update would have to be undone that was not recorded.
        """
        target = [s - n for s, n in zip(self.seen, removed, strict=True)]
        versions = [*self._past, self._now]
        chosen = [choose(versions, row, n, self.n_up) for row, n in enumerate(target)]
        if None in chosen or self._torn:
            raise RuntimeError(
                f"crop: cannot undo the memory update of layer {self.layer_idx} that dropped "
                f"tokens, asked to remove {max(removed)} tokens; call "
                "cache.activate_past_recording() before the tokens come in"
            )
        found = [pair for pair in chosen if pair is not None]
        sources = [(version, row) for row, (version, _) in enumerate(found)]
        undone = sum(
            all(not d or t < s for d, t, s in zip(v.due, target, v.seen, strict=True))
            for v in self._past
        )
        excess = [drop for _, drop in found]
        return Cropped(gather(sources, self.num_kv_heads, self.n_up, excess), undone)

    def restore(self, cropped: Cropped) -> None:
        """Become what ``cropped`` found; drops the recorded past."""
        self.num_updates -= cropped.undone
        self._become(cropped.version)

    def crop(self, removed: Sequence[int]) -> None:
        """``cropped`` and ``restore``."""
        self.restore(self.cropped(removed))

    def roll_back(self) -> None:
        """Forget what came in since ``mark``, in a call in which something failed.

        Raises:
            RuntimeError: if it got as far as an update, and that was not recorded.
        """
        self.crop([now - before for now, before in zip(self.seen, self._before, strict=True)])

    @lasting
    def end_rows(self, ends: Sequence[int]) -> None:
        """Forget what came in behind the end of each row's text; drops the recorded past.

        A row is then as if it had never seen it, unless an update came in between. That update
        stays: of the tokens it kept, those behind the end go, and a new period begins.

        Args:
            ends: ``[B]`` tokens of each row up to its end.
        """
        versions, sources, excess = [*self._past, self._now], [], []
        late: list[int | None] = []
        for row, end in enumerate(ends):
            chosen = choose(versions, row, end, self.n_up)
            late.append(end if chosen is None else None)
            version, drop = chosen or (self._now, self._now.since(row, self.n_up))
            sources.append((version, row))
            excess.append(drop)
        ended = gather(sources, self.num_kv_heads, self.n_up, excess)
        if late != [None] * self.batch_size:
            ended = without_tails(ended, self.num_kv_heads, self.n_up, late)
        self._become(ended)

    @lasting
    def select_rows(self, rows: Sequence[int]) -> None:
        """Make batch row i a copy of the old row ``rows[i]``; drops the recorded past."""
        sources = [(self._now, row) for row in rows]
        index = from_host(rows, torch.int64, self.param_index.device)
        self.param_index = self.param_index[index]
        self._become(gather(sources, self.num_kv_heads, self.n_up, [0] * len(rows)))

    def _become(self, version: Version) -> None:
        self.forget_past()
        old, new = self.held, (version.kv_bytes, version.memory_bytes)
        if version.store.segments.k is not self.store.segments.k:
            self.ledger.add(*new)
            self.ledger.add(-old[0], -old[1])
        self.store, self.seen = version.store, version.seen
        self.q_window, self.lse_window = version.q_window, version.lse_window
        self.batch_size = len(version.seen)
        device = self.store.segments.k.device
        self.overdue = Planner(self.n_up).due(version.seen, version.due, device)
        self._before = version.seen

    def release(self) -> None:
        """Take this layer's bytes off the books; the store must not be used afterwards."""
        self.forget_past()
        self.ledger.add(-self.ledger.kv, -self.ledger.memory)
