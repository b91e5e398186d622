"""What makes the scores of one model's layers and heads comparable: a frozen, checked value."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_OF_HEADS = ("scales", "offsets")


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the layers and heads of a model compare under one policy.

    Heads are compared by ``scales * score + offsets``.

    Attributes:
        offsets: ``[L, H]`` float32.
        fractions: ``[Q]`` float64, ascending in (0, 1], the last one 1: shares of the tokens seen
            that all layers together may keep.
        layer_fractions: ``[L, Q]`` float64: the share that layer l then keeps of its own. Its mean
            over the layers is ``fractions``, it never falls along Q, and the last column is 1.
        scales: ``[L, H]`` float32, at least 0; None, or left out of a file, for ones.

    Raises:
        ValueError: if a tensor has another shape, is not finite, or breaks what is said above.

    Example:
        >>> calibration = Calibration(
        ...     torch.zeros(2, 4), torch.tensor([0.5, 1.0]), torch.tensor([[0.2, 1.0], [0.8, 1.0]]))
        >>> [round(calibration.layer_fraction(0, f), 6) for f in (0.25, 0.5, 0.75)]
        [0.1, 0.2, 0.6]
    """

    offsets: Tensor
    fractions: Tensor
    layer_fractions: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scales is None and isinstance(self.offsets, Tensor):
            object.__setattr__(self, "scales", torch.ones_like(self.offsets))
        for name, dim, dtype in (
            ("offsets", 2, torch.float32),
            ("scales", 2, torch.float32),
            ("fractions", 1, torch.float64),
            ("layer_fractions", 2, torch.float64),
        ):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                _fail(name, "a floating tensor", kind)
            if value.dim() != dim or value.numel() == 0:
                _fail(name, f"{dim}-dimensional and not empty", list(value.shape))
            if not bool(value.isfinite().all()):
                _fail(name, "finite", "NaN or infinite values")
            # The fractions decide on the host.
            device = value.device if name in _OF_HEADS else torch.device("cpu")
            value = value.detach().to(device, dtype, copy=True).contiguous()
            object.__setattr__(self, name, value)
        assert self.scales is not None
        if self.scales.shape != self.offsets.shape:
            _fail("scales", f"{list(self.offsets.shape)} as offsets", list(self.scales.shape))
        if bool((self.scales < 0).any()):
            _fail("scales", "at least 0", self.scales.tolist())
        fractions, layers = self.fractions, self.layer_fractions
        if fractions[0] <= 0 or fractions[-1] != 1 or bool((fractions.diff() <= 0).any()):
            _fail("fractions", "ascending in (0, 1] and end at 1", fractions.tolist())
        shape = [self.offsets.shape[0], fractions.numel()]
        if list(layers.shape) != shape:
            _fail("layer_fractions", f"{shape}, layers and fractions", list(layers.shape))
        if bool((layers < 0).any()) or bool((layers.diff() < 0).any()):
            _fail("layer_fractions", "at least 0 and never fall along a row", layers.tolist())
        if bool((layers[:, -1] != 1).any()):
            _fail("layer_fractions", "1 in the last column", layers[:, -1].tolist())
        mean = layers.mean(dim=0)
        if not torch.allclose(mean, fractions, rtol=0.0, atol=1e-5):
            _fail("layer_fractions", f"{fractions.tolist()} on average over layers", mean.tolist())

    @property
    def num_layers(self) -> int:
        """L."""
        return self.offsets.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.offsets.shape[1]

    def check_model(self, num_layers: int | None, num_kv_heads: int | None) -> None:
        """Make sure that a model has the layers and KV heads it was taken from; None skips one.

        Raises:
            ValueError: names both numbers.
        """
        for what, ours, theirs in (
            ("layers", self.num_layers, num_layers),
            ("KV heads", self.num_kv_heads, num_kv_heads),
        ):
            if theirs is not None and ours != theirs:
                raise ValueError(
                    f"Calibration: the model must have {ours} {what}, as the one that was "
                    f"calibrated, got {theirs}; run `namm calibrate MODEL` for this model"
                )

    def layer_fraction(self, layer_idx: int, fraction: float) -> float:
        """The share a layer keeps when all together keep ``fraction``, linear between the Q."""
        xs, ys = self._points
        y = ys[layer_idx]
        # 0 of all tokens is 0 of every layer's.
        q = min(bisect.bisect_left(xs, fraction, lo=1), len(xs) - 1)
        part = (fraction - xs[q - 1]) / (xs[q] - xs[q - 1])
        return y[q - 1] + part * (y[q] - y[q - 1])

    @cached_property
    def _points(self) -> tuple[list[float], list[list[float]]]:
        layers = [[0.0, *row] for row in self.layer_fractions.tolist()]
        return [0.0, *self.fractions.tolist()], layers

    def comparable(self, scores: Tensor, layer_idx: int, head: Tensor) -> Tensor:
        """``scales * scores + offsets`` in the dtype of the scores.

        Args:
            scores: ``[N]`` of one layer.
            layer_idx: of the layer.
            head: ``[N]`` integers, the KV head of each score.
        """
        assert self.scales is not None
        scales, offsets = (t[layer_idx].to(scores) for t in (self.scales, self.offsets))
        return scales[head] * scores + offsets[head]

    def moved(self, moves: Tensor) -> Calibration:
        """The same with other offsets and another division among the layers.

        Args:
            moves: ``L (1 + H)`` numbers, for each layer first what is added to the log odds of its
                share, then what is added to the offsets of its heads. Zeros change nothing; a
                constant added to the shares of all layers, or to all heads of one, neither.

        Raises:
            ValueError: if there are more or fewer.

        Example:
            A memory whose division is evolved on tasks (:class:`Population`)::

                def candidate(x):
                    return memory.with_calibration(memory.calibration.moved(x))

                evolve(
                    model, ReadingProblem(tokenizer, text_weight=10.0), config, "runs/mine",
                    x0=torch.zeros(memory.calibration.num_moves),
                    policy_of=lambda x: Population.of(candidate, x),
                )
        """
        if not isinstance(moves, Tensor) or moves.numel() != self.num_moves:
            got = moves.numel() if isinstance(moves, Tensor) else type(moves).__name__
            _fail("moves", f"{self.num_moves} numbers, L (1 + H)", got)
        moves = moves.detach().cpu().double().view(self.num_layers, -1)
        odds = self.layer_fractions.logit() + moves[:, :1]
        # The shift that gives each column its mean again, by bisection.
        low, high = torch.full_like(self.fractions, -100), torch.full_like(self.fractions, 100)
        for _ in range(64):
            middle = (low + high) / 2
            too_much = (odds + middle).sigmoid().mean(0) > self.fractions
            high, low = torch.where(too_much, middle, high), torch.where(too_much, low, middle)
        shares = (odds + low).sigmoid()
        shares[:, -1] = 1.0
        offsets = self.offsets + moves[:, 1:].to(self.offsets)
        return dataclasses.replace(self, offsets=offsets, layer_fractions=rising(shares))

    @property
    def num_moves(self) -> int:
        """How many numbers :meth:`moved` takes."""
        return self.num_layers * (1 + self.num_kv_heads)

    def to(self, device: torch.device | str) -> Calibration:
        """The same with scales and offsets on ``device``; itself if they are there."""
        if self.offsets.device == torch.empty(0, device=device).device:
            return self
        # Not `replace`: its checks would wait for the device.
        moved = object.__new__(Calibration)
        for name in _fields():
            value = getattr(self, name)
            object.__setattr__(moved, name, value.to(device) if name in _OF_HEADS else value)
        return moved

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, scales only if they are not ones; :meth:`from_tensors` reads it."""
        tensors = {name: getattr(self, name) for name in _fields()}
        if bool((tensors["scales"] == 1).all()):
            del tensors["scales"]
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: if a tensor is missing or unknown, or as the class says.
        """
        names = _fields()
        if set(tensors) | {"scales"} != set(names):
            _fail("tensors", ", ".join(names), ", ".join(tensors) or "none")
        return cls(**tensors)


def regress(scores: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and offsets of a calibration: least squares of the target on the score of each head.

    A head whose scores say nothing, or the contrary, gets the scale 0: its tokens are all alike,
    as important as they are on average.

    Args:
        scores: ``[L, H, T]`` of each text; finite. Leave out the tokens of the floors, which stay
            whatever their score is.
        targets: what the scores stand for, of the same tokens, such as log importance.

    Returns:
        ``[L, H]`` scales and offsets, float32.

    Raises:
        ValueError: if there is no token.

    Example:
        >>> score = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
        >>> target = torch.tensor([[[1.0, 3.0, 5.0], [2.0, 1.0, 0.0]]])
        >>> regress([score], [target])
        (tensor([[2., 0.]]), tensor([[1., 1.]]))
    """
    x, y = (torch.cat(list(parts), dim=2).double() for parts in (scores, targets))
    if not x.shape[2]:
        raise ValueError("regress: scores must hold at least one token, got none")
    mean_x, mean_y = x.mean(2), y.mean(2)
    x, y = x - mean_x[..., None], y - mean_y[..., None]
    tiny = torch.finfo(x.dtype).tiny
    scales = ((x * y).sum(2) / x.square().sum(2).clamp(min=tiny)).clamp(min=0.0)
    return scales.float(), (mean_y - scales * mean_x).float()


def rising(shares: Tensor) -> Tensor:
    """The same ``[L, Q]`` where no row ever falls and columns have the means they had."""
    columns = [shares[:, -1]]
    for column in reversed(shares[:, :-1].unbind(1)):
        most, mean = columns[-1], column.mean()
        column = column.minimum(most)
        room = most - column
        columns.append(column + room * ((mean - column.mean()) / room.mean().clamp(min=1e-12)))
    return torch.stack(columns[::-1], 1)


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Calibration)]


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"Calibration: {name} must be {expected}, got {got}")
