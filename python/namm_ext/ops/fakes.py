"""What torch.compile needs to know: shapes and dtypes of the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import kernels


def fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Register what an op returns for tensors without data.

    It is asked for real tensors too as soon as one of them is on the "meta" device: it would do
    nothing then, and say nothing.
    """

    def register(function: Callable[..., Any]) -> None:
        def checked(*args: Any) -> Any:
            devices = {str(a.device): i for i, a in enumerate(args) if isinstance(a, Tensor)}
            if len(devices) > 1:
                names = [a.name for a in getattr(kernels, name).default._schema.arguments]
                where = ", ".join(f"{names[i]} on {device}" for device, i in devices.items())
                raise RuntimeError(f"{name}: all tensors must be on one device, got {where}")
            return function(*args)

        torch.library.register_fake(f"namm_ext::{name}")(checked)

    return register


@fake("append_")
def _(*args: Any) -> None:
    return None


@fake("attend_")
def _(*args: Any) -> None:
    return None


@fake("record_")
def _(*args: Any) -> None:
    return None


@fake("spectrogram")
def _(
    q_window: Tensor, lse_window: Tensor, k: Tensor, pos: Tensor, state: Tensor, *_: Any
) -> Tensor:
    return state.new_empty(state.shape)


@fake("attention_received")
def _(q_window: Tensor, lse_window: Tensor, k: Tensor, *_: Any) -> Tensor:
    return lse_window.new_empty(k.shape[0])


@fake("bam_scores")
def _(state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape[0])


@fake("mlp_scores")
def _(state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape[0])


@fake("gate_")
def _(*args: Any) -> None:
    return None


@fake("select")
def _(
    scores: Tensor, pos: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.uint8), seqused_k.new_empty(seqused_k.shape)


@fake("compact")
def _(
    k: Tensor, v: Tensor, pos: Tensor, state: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    capacity = rest[-1]
    return (
        k.new_empty(capacity, k.shape[1]),
        v.new_empty(capacity, v.shape[1]),
        pos.new_empty(capacity),
        state.new_empty(capacity, state.shape[1]),
    )
