"""Between the host and the device of a model: what costs a wait, and how it is spared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def waits(device: torch.device) -> bool:
    """Whether reading a number from a tensor on ``device`` makes the host wait."""
    return device.type != "cpu"


def from_host(
    values: Sequence[int] | Sequence[bool], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of numbers that the host knows, without waiting for the device.

    ``torch.tensor(values, device="cuda")`` would wait until the copy is done.

    Args:
        values: plain numbers.
        dtype: of the tensor.
        device: where it is needed.

    Example:
        >>> from_host([1, 2], torch.int32, torch.device("cpu"))
        tensor([1, 2], dtype=torch.int32)
    """
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # The allocator of pinned memory keeps it until the copy is done.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
