"""The updates of several layers with one wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..policy import check_num_kept
from .store import RaggedKV


def update_together(stores: Sequence[RaggedKV], faults: Sequence[tuple[Tensor, str]] = ()) -> None:
    """Make the updates that are overdue: all layers decide, the host reads what stays, once per
    device, and all build their new stores.

    Args:
        stores: of layers.
        faults: 0-dim bool tensors that must be False, and what to say where one is not.

    Raises:
        ValueError: for a fault, or if the policy's scores are NaN, naming layer, row and head. No
            store has changed then.
    """
    due = [(kv, kv.overdue) for kv in stores if kv.overdue is not None]
    decisions = [(kv, kv.decide(overdue)) for kv, overdue in due]
    read = _read([d.num_kept for _, d in decisions] + [flag.view(1) for flag, _ in faults])
    for (_, message), (fault,) in zip(faults, read[len(decisions) :], strict=True):
        if fault:
            raise ValueError(message)
    counts = [
        check_num_kept(numbers, decision.context)
        for (_, decision), numbers in zip(decisions, read, strict=False)
    ]
    with ExitStack() as held:
        for kv, decision in decisions:
            held.enter_context(kv.ledger.holding(decision.transient_bytes))
        for (kv, decision), kept in zip(decisions, counts, strict=True):
            kv.renew(decision, kept)


def _read(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of small tensors, with one wait for each device."""
    found: dict[int, list[int]] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        mine = [i for i, t in enumerate(tensors) if t.device == device]
        numbers = torch.cat([tensors[i].to(torch.int32) for i in mine]).tolist()
        for i in mine:
            size = tensors[i].numel()
            found[i], numbers = numbers[:size], numbers[size:]
    return [found[i] for i in range(len(tensors))]
