"""How a model's RoPE turns queries and keys: what it takes to turn them once more."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """RoPE as numbers: the first ``2 * len(frequencies)`` dimensions turn in pairs.

    Attributes:
        frequencies: radians per position of each pair; none for a model without RoPE.
        interleaved: pairs are neighbours (2 i, 2 i + 1) and not (i, i + R / 2).

    Example:
        >>> quarter = Rotation((torch.pi / 2,))
        >>> quarter.turn(torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([1])).round()
        tensor([[0., 1., 5.]])
    """

    frequencies: tuple[float, ...] = ()
    interleaved: bool = False

    def turn(self, x: Tensor, steps: Tensor, spread: int = 1) -> Tensor:
        """Turn by as many positions as ``steps`` says.

        Args:
            x: ``[..., T, D]`` float32 or float64.
            steps: ``[T]`` integers.
            spread: the mean over the turns by ``steps``, ``steps + 1``, ... ``steps + spread - 1``.
        """
        if not self.frequencies:
            return x
        # A pair is a complex number, its turn a factor.
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        later = torch.arange(spread, device=x.device)[:, None] * frequencies
        mean = torch.polar(torch.ones_like(later), later).mean(0)
        angles = steps[:, None] * frequencies
        factors = torch.polar(torch.ones_like(angles), angles) * mean
        half = len(self.frequencies)
        pairs, rest = x[..., : 2 * half], x[..., 2 * half :]
        pairs = pairs.unflatten(-1, (half, 2) if self.interleaved else (2, half))
        dim = -1 if self.interleaved else -2
        turned = torch.complex(*pairs.unbind(dim)) * factors.to(x.dtype.to_complex())
        pairs = torch.stack([turned.real, turned.imag], dim).flatten(-2)
        return torch.cat([pairs, rest], dim=-1)


def rotation_of(model: Any) -> Rotation:
    """The rotation of a transformers model, in its layers with full attention.

    Raises:
        ValueError: if the model has RoPE, but not in the form that is usual in transformers.
    """
    decoder = model.get_decoder()
    found = {name: b for name, b in decoder.named_buffers() if name.endswith("inv_freq")}
    current = {name: b for name, b in found.items() if not name.endswith("original_inv_freq")}
    # Where kinds of layers turn differently, a memory has those with full attention.
    chosen = {name: b for name, b in current.items() if "full_attention" in name} or current
    if not chosen:
        return Rotation()
    rotate_half = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    if len(chosen) != 1 or rotate_half is None:
        raise ValueError(
            f"rotation_of: {type(decoder).__name__} must have one inv_freq and a rotate_half, got "
            f"{', '.join(found)} and {rotate_half}"
        )
    (frequencies,) = chosen.values()
    interleaved = rotate_half(torch.arange(4.0)).tolist() == [-1.0, 0.0, -3.0, 2.0]
    return Rotation(tuple(frequencies.double().tolist()), interleaved)
