"""What the layers of one cache share: books of columns, masks, planner, ledger."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..policy import Policy
from ..ragged import Ledger, Planner

Spans = tuple[tuple[int, int], ...]


class Session:
    """What the layers of one cache share. Layers refer to it and not to the cache: without a
    reference cycle, dropping a cache frees its memory at once."""

    def __init__(
        self, config: PreTrainedConfig, policy: Policy, param_index: Tensor | None, first: int
    ) -> None:
        self.config = config
        self.policy = policy
        self.param_index = param_index
        self.first = first  # the first layer with a memory: it sees every call before the others
        self.ledger = Ledger()
        self.model: weakref.ref[nn.Module] | None = None
        self.clear()

    def clear(self) -> None:
        self.planner = Planner(self.policy.n_up)
        self.padded = 0  # columns after the current call
        self.past_mask: Tensor | None = None  # [B, padded], None if there was no padding yet
        self.spans: Spans | None = None  # real columns of the current call, None if all are

    def policy_on(self, device: torch.device) -> Policy:
        # ``to`` returns the policy itself where nothing has to move.
        return self.policy.to(device)

    def read_mask(self, mask: Tensor | None, padded: int, batch_size: int, width: int) -> None:
        """Take the real columns of each row from the mask of a call, once for all layers.

        Raises:
            ValueError: if the mask has another shape, changed for cached tokens, or has holes.
        """
        self.spans = None
        if mask is None:
            if self.past_mask is not None:
                raise ValueError(
                    "namm: attention_mask must not change for tokens already in the cache; they "
                    "were padded, now there is no mask"
                )
            return
        if mask.shape != (batch_size, padded + width):
            raise ValueError(
                f"namm: attention_mask must be [batch, tokens seen + new tokens] = "
                f"[{batch_size}, {padded + width}], got {list(mask.shape)}"
            )
        mask = mask.bool()
        past = self.past_mask
        if bool(mask.all()):
            changed = past is not None
        else:
            old = mask[:, :padded]
            changed = not (bool(old.all()) if past is None else torch.equal(old, past))
        if changed:
            raise ValueError("namm: attention_mask must not change for tokens already in the cache")
        new = mask[:, padded:]
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
            self.past_mask = mask.clone()  # compiled graphs use their buffers again

    def crop_mask(self, padded: int) -> None:
        if self.past_mask is not None:
            past = self.past_mask[:, :padded]
            self.past_mask = None if bool(past.all()) else past

    def select_mask(self, rows: Tensor) -> None:
        if self.past_mask is not None:
            self.past_mask = self.past_mask[rows.to(self.past_mask.device)]
