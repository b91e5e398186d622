"""Configuration of a NAMM: one frozen, validated dataclass. Standard library only."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .budget import is_int, is_number, known_fields

_HOP = 16
_NUM_BINS = 17
_NUM_FEATURES = 8 + _NUM_BINS
_NUM_BAM_PARAMS = 4172
# The ops take no wider or deeper MLP, and compute in float32: here its normal numbers.
_MOST_UNITS = 1 << 16
_MOST_PARAMS = (1 << 31) - 1
_FLOAT32 = 1.2e-38, 3.4e38


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"NAMMConfig: {name} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class NAMMConfig:
    """How a NAMM scores tokens, apart from its parameters and statistics.

    The defaults are the original's first stage. How many tokens stay is said by a
    :class:`~namm_ext.budget.Budget`.

    Attributes:
        n_up: real tokens between two updates; a positive multiple of 16.
        ema_coeff: decay of the spectral features per token, in (0, 1).
        scorer: "bam" (attention over newer tokens), "mlp", or "none": the gate alone, which needs
            no queries and no spectral features.
        mlp_hidden: width of the hidden layers of the MLP, at most 65,536.
        mlp_depth: layers of the MLP, at most 65,536; 1 is a linear map.
        mlp_bias: whether the layers of the MLP have biases.
        mlp_residual_first: add the input to the first hidden layer; needs ``mlp_hidden == 25``.
        feature_transform: "none", or "log" for ``log(ema + log_eps)`` before the normalisation.
        log_eps: a positive float32; only used by "log".

    Raises:
        ValueError: if a field is outside its range or two of them contradict each other.

    Example:
        >>> NAMMConfig(n_up=64).num_params
        4172
        >>> NAMMConfig(n_up=100)
        Traceback (most recent call last):
        ValueError: NAMMConfig: n_up must be a positive multiple of 16, got 100
    """

    n_up: int = 512
    ema_coeff: float = 0.99
    scorer: str = "bam"
    mlp_hidden: int = 25
    mlp_depth: int = 1
    mlp_bias: bool = False
    mlp_residual_first: bool = False
    feature_transform: str = "none"
    log_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not is_int(self.n_up) or self.n_up <= 0 or self.n_up % _HOP:
            _fail("n_up", f"a positive multiple of {_HOP}", self.n_up)
        if not is_number(self.ema_coeff) or not 0.0 < self.ema_coeff < 1.0:
            _fail("ema_coeff", "a number in (0, 1)", self.ema_coeff)
        for name, choices in (
            ("scorer", ("bam", "mlp", "none")),
            ("feature_transform", ("none", "log")),
        ):
            value = getattr(self, name)
            if value not in choices:
                _fail(name, " or ".join(repr(choice) for choice in choices), value)
        for name in ("mlp_bias", "mlp_residual_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                _fail(name, "a bool", value)
        for name in ("mlp_hidden", "mlp_depth"):
            value = getattr(self, name)
            if not is_int(value) or not 1 <= value <= _MOST_UNITS:
                _fail(name, f"an int in [1, {_MOST_UNITS}]", value)
        least, most = _FLOAT32
        if not is_number(self.log_eps) or not least <= self.log_eps <= most:
            _fail("log_eps", f"a float32 in [{least}, {most}]", self.log_eps)
        if self.mlp_residual_first and self.mlp_depth > 1 and self.mlp_hidden != _NUM_FEATURES:
            _fail("mlp_hidden", f"{_NUM_FEATURES} with mlp_residual_first", self.mlp_hidden)
        if self.num_params > _MOST_PARAMS:
            _fail("mlp_depth", f"at most what makes {_MOST_PARAMS} parameters", self.mlp_depth)

    @property
    def num_bins(self) -> int:
        """Spectral features per token: 17."""
        return _NUM_BINS

    @property
    def num_params(self) -> int:
        """Size of the flat parameter vector of the scorer.

        Example:
            >>> NAMMConfig(scorer="mlp", mlp_depth=2, mlp_bias=True).num_params
            676
        """
        if self.scorer == "none":
            return 0
        if self.scorer == "bam":
            return _NUM_BAM_PARAMS
        widths = [_NUM_FEATURES, *([self.mlp_hidden] * (self.mlp_depth - 1)), 1]
        return sum(
            fan_in * fan_out + (fan_out if self.mlp_bias else 0)
            for fan_in, fan_out in itertools.pairwise(widths)
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as a plain dict, ready for JSON; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NAMMConfig:
        """Build a config from a mapping; missing fields take their defaults.

        Raises:
            TypeError: if ``values`` is not a mapping.
            ValueError: for an unknown key or a value outside its range.

        Example:
            >>> NAMMConfig.from_dict({"n_up": 64}).n_up
            64
        """
        return cls(**known_fields(cls, values))

    def replace(self, **changes: Any) -> NAMMConfig:
        """A copy with some fields changed, validated again.

        Example:
            >>> NAMMConfig().replace(n_up=64).n_up
            64
        """
        return NAMMConfig.from_dict({**self.to_dict(), **changes})
