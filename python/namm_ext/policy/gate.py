"""What a token's own keys and values say about it: the gate of one model (spec 12.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .base import UpdateContext


@dataclass(frozen=True, eq=False)
class Gate:
    """A linear map from the keys and values of a token, in all KV heads of a layer, to a score.

    Rotation-invariant in the keys, so it needs neither positions nor hidden states. It belongs to
    the model it was fitted to (:func:`namm_ext.fitting.fit_gate`).

    Attributes:
        weight: ``[L, H, I]`` float32, I inputs as :func:`namm_ext.reference.gate_inputs` has them.
        bias: ``[L, H]`` float32.
        rotary_dim: dimensions of a key that are rotated, even.
        interleaved: whether rotated pairs are neighbours (GPT-J) or half a rotary dimension apart
            (Llama).

    Raises:
        ValueError: if a tensor has another shape or is not finite.
    """

    weight: Tensor
    bias: Tensor
    rotary_dim: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name, dim in (("weight", 3), ("bias", 2)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != dim or not value.numel():
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"Gate: {name} must be a {dim}-dimensional tensor, not empty, got {got}"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"Gate: {name} must be finite, got NaN or infinite values")
            value = value.detach().to(torch.float32, copy=True).contiguous()
            object.__setattr__(self, name, value)
        if self.bias.shape != self.weight.shape[:2]:
            raise ValueError(
                f"Gate: bias must be {list(self.weight.shape[:2])}, got {list(self.bias.shape)}"
            )
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            raise ValueError(
                f"Gate: rotary_dim must be even and not negative, got {self.rotary_dim}"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return self.weight.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.weight.shape[1]

    def write(self, ctx: UpdateContext, n_up: int) -> None:
        """Put the scores of the newest ``n_up`` tokens into the last column of the state.

        A number depends on its token alone, so writing it twice changes nothing.

        Raises:
            ValueError: if the gate was fitted to a model of another shape.
        """
        segments = ctx.segments
        self.check_layer(ctx.layer_idx, ctx.num_kv_heads, segments.k.shape[1], segments.v.shape[1])
        ops.gate_(
            segments,
            ctx.window.active,
            self.weight[ctx.layer_idx],
            self.bias[ctx.layer_idx],
            num_new=n_up,
            rotary_dim=self.rotary_dim,
            interleaved=self.interleaved,
        )

    def check_layer(
        self, layer_idx: int, num_kv_heads: int, head_dim: int, head_dim_v: int
    ) -> None:
        """Make sure that a layer of a model is one that the gate was fitted to.

        Raises:
            ValueError: names what the gate has and what the model has.
        """
        inputs = num_kv_heads * (head_dim + head_dim_v + 2)
        ours = (self.num_kv_heads, self.weight.shape[2])
        if layer_idx >= self.num_layers or ours != (num_kv_heads, inputs):
            raise ValueError(
                f"Gate: it was fitted to a model with {self.num_layers} layers, {ours[0]} KV heads "
                f"and {ours[1]} inputs per token, got layer {layer_idx} with {num_kv_heads} KV "
                f"heads and {inputs} inputs; fit one with `namm fit MODEL`, or take it off with "
                "policy.with_gate(None)"
            )

    def to(self, device: torch.device | str) -> Gate:
        """The same on ``device``; itself if it is there."""
        if self.weight.device == torch.empty(0, device=device).device:
            return self
        moved = object.__new__(Gate)  # not __init__: its checks would wait for the device
        for name, value in vars(self).items():
            value = value.to(device) if isinstance(value, Tensor) else value
            object.__setattr__(moved, name, value)
        return moved

    def settings(self) -> dict[str, Any]:
        """What is no tensor, as JSON has it."""
        return {"rotary_dim": self.rotary_dim, "interleaved": self.interleaved}

    def tensors(self) -> dict[str, Tensor]:
        """``weight`` and ``bias``; :meth:`from_parts` takes them back."""
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
        """The inverse of :meth:`settings` and :meth:`tensors`.

        Raises:
            ValueError: if something is missing or unknown, or as the class says.
        """
        names = {"weight", "bias", "rotary_dim", "interleaved"}
        if set(settings) | set(tensors) != names:
            raise ValueError(
                f"Gate: fields must be {', '.join(sorted(names))}, got "
                f"{', '.join(sorted({*settings, *tensors})) or 'none'}"
            )
        values: dict[str, Any] = {**settings, **tensors}
        return cls(**values)
