"""What the layers of one cache share: columns seen, masks, planner, ledger."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..policy import Policy
from ..ragged import ROLLBACK_TOKENS, Ledger, Planner
from .recurrent import Recurrent, refuse

Spans = tuple[tuple[int, int], ...]


class Session:
    """What the layers of one cache share. Layers refer to it and not to the cache: without a
    reference cycle, dropping a cache frees its memory at once.

    A call counts when the last layer has taken its tokens. Until then ``length`` and
    ``past_mask`` are what they were, so a call that fails on its way leaves them, and every layer
    that had gone ahead is told by the next call where it must go back to.

    Attributes:
        length: columns that all layers have seen.
        target: columns after the current call.
        past_mask: ``[B, length]`` bool, None if there was no padding yet.
        spans: real columns of each row in the current call, None if all are.
        recording: whether updates can be undone.
        hears_use_cache: whether attention is told the model's ``use_cache``.
        evicts: whether the policy decides; otherwise all tokens stay.
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
    ) -> None:
        self.config = config
        self.policy = policy
        self.param_index = param_index
        self.first, self.last = memories[0], memories[-1]  # layers with a memory
        self.num_memories = len(memories)
        self.evicts = self.hears_use_cache = True
        self.sliding = sliding
        self.recurrent = Recurrent(recurrent, self.first, self.last)
        self.ledger = Ledger()
        self.model: weakref.ref[nn.Module] | None = None
        self.clear()

    def clear(self) -> None:
        self.planner = Planner(self.policy.n_up)
        self.recurrent.clear()
        self.length = self.target = 0
        self.past_mask: Tensor | None = None
        self.spans: Spans | None = None
        self.recording = False
        self._mask: Tensor | None = None  # past_mask after the current call
        self._calls = 0  # since the last crop, while recording
        # Keys, values and length of sliding layers that take tokens before anything was checked.
        self._before: dict[int, tuple[Tensor | None, Tensor | None, int]] = {}

    def policy_on(self, device: torch.device) -> Policy:
        # ``to`` returns the policy itself where nothing has to move.
        return self.policy.to(device)

    # A call --------------------------------------------------------------------------------------

    def begin(self, mask: Tensor | None, batch_size: int, width: int) -> None:
        """The first layer with a memory meets a call: check it, before any memory takes tokens."""
        self.settle_length()
        self.recurrent.begin()
        self._read_mask(mask, batch_size, width)
        self.target = self.length + width
        if self.recording:
            self._calls += 1
            if self._calls > ROLLBACK_TOKENS:
                self.end_recording()

    def commit(self) -> None:
        """The last layer with a memory has taken the tokens."""
        self.length, self.past_mask = self.target, self._mask
        self.recurrent.commit()

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

    def _read_mask(self, mask: Tensor | None, batch_size: int, width: int) -> None:
        """Take the real columns of each row from the mask of a call, once for all layers.

        Raises:
            ValueError: if the mask has another shape, changed for cached tokens, or has holes.
        """
        self.spans = self._mask = None
        if mask is None:
            if self.past_mask is not None:
                raise ValueError(
                    "namm: attention_mask must not change for tokens already in the cache; they "
                    "were padded, now there is no mask"
                )
            return
        if mask.shape != (batch_size, self.length + width):
            raise ValueError(
                f"namm: attention_mask must be [batch, tokens seen + new tokens] = "
                f"[{batch_size}, {self.length + width}], got {list(mask.shape)}"
            )
        mask = mask.bool()
        past = self.past_mask
        if bool(mask.all()):
            changed = past is not None
        else:
            old = mask[:, : self.length]
            changed = not (bool(old.all()) if past is None else torch.equal(old, past))
        if changed:
            raise ValueError("namm: attention_mask must not change for tokens already in the cache")
        new = mask[:, self.length :]
        if not bool(new.all()):
            counts = new.sum(dim=1)
            first = new.int().argmax(dim=1)
            last = width - 1 - new.flip(1).int().argmax(dim=1)
            rows = torch.stack([first, counts, last]).T.tolist()
            for b, (f, n, last_column) in enumerate(rows):
                if n and last_column - f + 1 != n:
                    raise ValueError(
                        f"namm: attention_mask must have its ones side by side in each call, row "
                        f"{b} has holes"
                    )
            self.spans = tuple((f, n) for f, n, _ in rows)
        if past is not None or self.spans is not None:
            self._mask = mask.clone()  # compiled graphs use their buffers again

    def crop_mask(self, length: int) -> None:
        if self.past_mask is not None:
            self._keep_mask(self.past_mask[:, :length])

    def select_mask(self, rows: Tensor) -> None:
        if self.past_mask is not None:
            self._keep_mask(self.past_mask[rows.to(self.past_mask.device)])

    def _keep_mask(self, mask: Tensor) -> None:
        # A batch without padding may come with a mask or without.
        self.past_mask = None if bool(mask.all()) else mask
