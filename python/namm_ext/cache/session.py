"""What the layers of one cache share: columns seen, masks, planner, ledger."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..policy import Policy
from ..ragged import ROLLBACK_TOKENS, Ledger, Planner, RaggedKV, Runs, update_together
from ..transfer import waits
from .recurrent import Recurrent, refuse
from .versions import rereads


class Session:
    """What the layers of one cache share. Layers refer to it and not to the cache: without a
    reference cycle, dropping a cache frees its memory at once.

    A call counts when the last layer has taken its tokens. Until then ``length`` and
    ``past_mask`` are what they were, so a call that fails on its way leaves them, and every layer
    that had gone ahead is told by the next call where it must go back to.

    Where reading a tensor makes the host wait for the device, a call of one column goes on without
    as soon as every row has begun: its tokens are taken as real, and the mask is read with the next
    update, which waits anyway.

    Attributes:
        length: columns that all layers have seen.
        target: columns after the current call.
        runs: real columns of each row in the current call, None if all are.
        ends: ``[B]`` tokens of each row up to the end of its text, where a mask has turned the
            last ones into padding and not every memory has gone back behind it yet.
        recording: whether updates can be undone.
        has_readers: whether layers without keys read those of a memory.
        last: the last layer that takes part in a call: with a memory, or a reader of one.
        hears_use_cache: whether attention is told the model's ``use_cache``.
        evicts: whether the policy decides; otherwise all tokens stay.
        stores: of layers in the current call whose updates wait for its end.
        num_memories: layers with a memory.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: Policy,
        param_index: Tensor | None,
        memories: list[int],
        sliding: dict[int, DynamicSlidingWindowLayer],
        recurrent: dict[int, Any],
        readers: list[int],
    ) -> None:
        self.config = config
        self.policy = policy
        self.param_index = param_index
        self.first, self.last = memories[0], max([memories[-1], *readers])
        self.num_memories = len(memories)
        self.evicts = self.hears_use_cache = True
        self.has_readers = bool(readers)
        self.sliding = sliding
        self.recurrent = Recurrent(recurrent, self.first, self.last)
        self.ledger = Ledger()
        self.model: weakref.ref[nn.Module] | None = None
        self.clear()

    def clear(self) -> None:
        self.planner = Planner(self.policy.n_up)
        self.recurrent.clear()
        self.length = self.target = 0
        self.stores: list[RaggedKV] = []
        self._past: Tensor | None = None
        self._unread: Tensor | None = None  # mask of the last call of one column
        self.runs: Runs | None = None
        self.ends: tuple[int, ...] | None = None
        self.recording = False
        self._mask: Tensor | None = None  # past_mask after the current call
        self._calls = 0  # since the last crop, while recording
        # Keys, values and length of sliding layers that take tokens before anything was checked.
        self._before: dict[int, tuple[Tensor | None, Tensor | None, int]] = {}

    def policy_on(self, device: torch.device) -> Policy:
        # ``to`` returns the policy itself where nothing has to move.
        return self.policy.to(device)

    # A call --------------------------------------------------------------------------------------

    def begin(self, mask: Tensor | None, seen: tuple[int, ...], width: int) -> None:
        """The first layer with a memory meets a call: check it, before any memory takes tokens.

        Args:
            mask: ``[B, length + width]``, or None.
            seen: real tokens of each row so far.
            width: columns of the call.
        """
        self.stores.clear()
        self.recurrent.begin()
        self._read_mask(mask, seen, width)
        self.target = self.length + width
        if self.recording:
            self._calls += 1
            if self._calls > ROLLBACK_TOKENS:
                self.end_recording()

    def commit(self) -> None:
        """The last layer has taken the tokens, or read those of a memory."""
        if any(kv.overdue is not None for kv in self.stores):
            update_together(self.stores, self._faults())
            self._unread = None
        self.stores.clear()
        recurrent, done = self.recurrent, self.recurrent.done + 1
        # In one line, which an interruption falls before or behind.
        self.length, self._past, self.ends, recurrent.done = self.target, self._mask, None, done
        recurrent.call_ended()

    def advance(self) -> None:
        """All layers have taken a column of text, and the device knows already."""
        self.length += 1
        self.target = self.length

    def started(self) -> None:
        """The first layer with a memory has taken the tokens."""
        self._before.clear()

    # After a call that failed --------------------------------------------------------------------

    def seen_by_all(self) -> int:
        """Columns that every layer has seen; sliding layers may come behind the last memory."""
        if not self.sliding:
            return self.length
        behind = [x.cumulative_length for i, x in self.sliding.items() if i > self.last]
        return min([self.length, *behind])

    def settle_length(self) -> None:
        length = self.seen_by_all()
        if length != self.length:
            self.length = length
            self.crop_mask(length)

    def settle_sliding(self) -> None:
        """Bring sliding layers that took tokens in a call that failed back.

        Raises:
            ValueError: if one has forgotten what it would need.
        """
        length = self.seen_by_all()
        for i, layer in self.sliding.items():
            ahead = layer.cumulative_length - length
            if not ahead:
                continue
            keys, values, before = self._before.get(i, (None, None, -1))
            if before == length:
                layer.keys, layer.values, layer.cumulative_length = keys, values, before
                layer.is_initialized = keys is not None
            elif ahead > 0 and (
                layer.record_past or layer.cumulative_length < layer.sliding_window
            ):
                layer.crop(-ahead)
            else:
                refuse(i)

    def remember(self, layer_idx: int) -> None:
        """Keep what ``settle_sliding`` needs of a layer until the call was checked."""
        layer = self.sliding.get(layer_idx)
        if layer is not None and layer_idx < self.first:
            self._before[layer_idx] = (layer.keys, layer.values, layer.cumulative_length)

    # Recording -----------------------------------------------------------------------------------

    def start_recording(self) -> None:
        self.recording, self._calls = True, 0
        for layer in self.sliding.values():
            layer.activate_past_recording()
        self.recurrent.record(True)

    def end_recording(self) -> None:
        """Layers with a memory drop what they recorded at their next call."""
        self.recording = False
        for layer in self.sliding.values():
            if layer.record_past and layer.is_initialized:
                layer.crop(0)
            layer.record_past = False
        self.recurrent.record(False)

    def cropped(self, length: int) -> None:
        """All layers have forgotten the columns from ``length`` on."""
        self.length = length
        self.crop_mask(length)
        self._calls = 0

    # Masks ---------------------------------------------------------------------------------------

    @property
    def past_mask(self) -> Tensor | None:
        """``[B, length]`` bool, None if there was no padding yet."""
        if self._past is not None and self._past.shape[1] < self.length:
            self._past = _longer(self._past, self.length - self._past.shape[1])
        return self._past

    @past_mask.setter
    def past_mask(self, mask: Tensor | None) -> None:
        self._past, self._unread = mask, None

    def _read_mask(self, mask: Tensor | None, seen: tuple[int, ...], width: int) -> None:
        """Take the real columns of each row from the mask of a call, once for all layers.

        Raises:
            ValueError: if the mask has another shape, or changed for cached tokens in another way
                than that the last ones of a row became padding.
        """
        self.runs = self._mask = None
        if mask is None:
            if self._past is not None:
                raise ValueError(
                    "namm: attention_mask must not change for tokens already in the cache; they "
                    "were padded, now there is no mask"
                )
            return
        if mask.shape != (len(seen), self.length + width):
            raise ValueError(
                f"namm: attention_mask must be [batch, tokens seen + new tokens] = "
                f"[{len(seen)}, {self.length + width}], got {list(mask.shape)}"
                f"{rereads(self.length)}"
            )
        if width == 1 and all(seen) and waits(mask.device):  # padding in front is behind us
            self._mask, self._unread = self._past, mask
            return
        self._unread = None
        mask = mask.bool()
        real = bool(mask.all())
        if not real or self.past_mask is not None:
            old, new = mask[:, : self.length], mask[:, self.length :]
            ended = self._ended(old)
            if not bool(new.all()):
                self.runs = _runs(new)
            if not real:
                self._mask = mask.clone()  # compiled graphs use their buffers again
            if any(ended):
                self.ends = tuple(s - n for s, n in zip(seen, ended, strict=True))
                self._keep_mask(mask[:, : self.length].clone())

    def _faults(self) -> list[tuple[Tensor, str]]:
        """Whether the mask that nobody has read yet is not what it was taken for."""
        if self._unread is None:
            return []
        unread = self._unread.bool()
        missing = unread.shape[1] - (0 if self._past is None else self._past.shape[1])
        past = torch.ones_like(unread) if self._past is None else _longer(self._past, missing)
        message = (
            "namm: attention_mask must be what it was for tokens already in the cache, and 1 for "
            "the new token of a call of one column, got another one in the last calls; the memory "
            "has taken them as text: start again with cache.reset()"
        )
        return [((unread != past).any(), message)]

    def _ended(self, old: Tensor) -> list[int]:
        """How many of each row's newest tokens are padding now.

        Raises:
            ValueError: if the mask of cached tokens changed in another way.
        """
        past = torch.ones_like(old) if self.past_mask is None else self.past_mask
        if torch.equal(old, past):
            return [0] * old.shape[0]
        gone = past & ~old
        behind = gone.int().cumsum(dim=1) > 0  # from the first one that is gone
        if bool((old & (~past | behind)).any()):
            raise ValueError(
                "namm: attention_mask must not change for tokens already in the cache, except "
                "that the last ones of a row become padding"
            )
        return gone.sum(dim=1).tolist()

    def crop_mask(self, length: int) -> None:
        if self._unread is not None:
            self._unread = self._unread[:, :length]
        if self._past is not None:
            self._keep_mask(self._past[:, :length])

    def select_mask(self, rows: Tensor) -> None:
        if self._unread is not None:
            self._unread = self._unread[rows.to(self._unread.device)]
        if self._past is not None:
            self._keep_mask(self._past[rows.to(self._past.device)])

    def _keep_mask(self, mask: Tensor) -> None:
        # A batch without padding may come with a mask or without.
        self._past = None if bool(mask.all()) else mask


def _longer(mask: Tensor, columns: int) -> Tensor:
    """A mask and so many columns of text more."""
    return F.pad(mask, (0, columns), value=True)


def _runs(mask: Tensor) -> Runs:
    """(first, number) of the ones side by side in each row of ``mask``."""
    edges = F.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, stops = ((edges == edge).nonzero().tolist() for edge in (1, -1))
    runs: list[list[tuple[int, int]]] = [[] for _ in range(mask.shape[0])]
    for (row, start), (_, stop) in zip(starts, stops, strict=True):
        runs[row].append((start, stop - start))
    return tuple(map(tuple, runs))
