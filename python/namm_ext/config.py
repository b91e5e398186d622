"""Configuration of a NAMM: one frozen, validated dataclass. Standard library only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HOP = 16
_NUM_BINS = 17
_NUM_FEATURES = 8 + _NUM_BINS
_NUM_BAM_PARAMS = 4172


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"NAMMConfig: {name} must be {expected}, got {got!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def check_layer_shares(owner: str, shares: tuple[float, ...]) -> None:
    """ValueError unless ``shares`` is a tuple of positive numbers with mean 1."""
    positive = isinstance(shares, tuple) and all(
        _is_number(share) and 0.0 < share < math.inf for share in shares
    )
    if not positive or not math.isclose(sum(shares), len(shares), rel_tol=1e-6):
        raise ValueError(
            f"{owner}: layer_shares must be positive numbers with mean 1, one per layer, "
            f"got {shares!r}"
        )


def layer_cache_size(cache_size: int, share: float) -> int:
    """Tokens per head of a layer that has ``share`` times the mean budget; at least 1.

    Example:
        >>> layer_cache_size(256, 0.25)
        64
    """
    return max(1, math.floor(cache_size * share + 1e-6))


@dataclass(frozen=True)
class NAMMConfig:
    """What a NAMM computes, apart from its parameters and statistics.

    The defaults are the original's first stage, except for ``selection``: the original fills
    every head of a layer up to the fullest one, which is ``selection="reference"``.

    Attributes:
        n_up: real tokens between two updates; a positive multiple of 16.
        ema_coeff: decay of the spectral features per token, in (0, 1).
        scorer: "bam" (attention over newer tokens) or "mlp".
        mlp_hidden: width of the hidden layers of the MLP.
        mlp_depth: layers of the MLP; 1 is a linear map.
        mlp_bias: whether the layers of the MLP have biases.
        mlp_residual_first: add the input to the first hidden layer; needs ``mlp_hidden == 25``.
        feature_transform: "none", or "log" for ``log(ema + log_eps)`` before the normalisation.
        log_eps: positive; only used by "log".
        selection: "ragged" keeps tokens with ``score >= threshold`` in each head; "reference"
            then fills every head up to the count of the fullest head of its layer.
        threshold: finite, or None for no threshold.
        cache_size: most tokens to keep, at least 1, or None for no limit.
        budget: whom cache_size counts for. "per_head": each head. "per_layer": cache_size times
            the heads, shared by the heads of a layer. "global": all layers share one calibrated
            ``threshold`` (:func:`namm_ext.policy.calibrate_threshold`), so the budget is met on
            average; cache_size is then an additional limit for each head.
        layer_shares: how the layers divide the budget, one positive number per layer with mean 1,
            or None for equal parts: layer l has ``cache_size * layer_shares[l]`` tokens per head
            (rounded down). Exact and local, unlike the global threshold.
        protect_newest: always keep the newest token. False is the original's plain top-k and
            needs ``threshold=None``, a cache_size and the budget "per_head".
        sink_tokens: always keep this many tokens at the start of the sequence.
        recent_tokens: always keep tokens younger than this, counted in original positions.

    Raises:
        ValueError: if a field is outside its range or two of them contradict each other.

    Example:
        >>> NAMMConfig(n_up=64, cache_size=256, threshold=None).num_params
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
    selection: str = "ragged"
    threshold: float | None = 0.0
    cache_size: int | None = None
    budget: str = "per_head"
    layer_shares: tuple[float, ...] | None = None
    protect_newest: bool = True
    sink_tokens: int = 0
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layer_shares, list):  # as JSON has it
            object.__setattr__(self, "layer_shares", tuple(self.layer_shares))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        if not _is_int(self.n_up) or self.n_up <= 0 or self.n_up % _HOP:
            _fail("n_up", f"a positive multiple of {_HOP}", self.n_up)
        if not _is_number(self.ema_coeff) or not 0.0 < self.ema_coeff < 1.0:
            _fail("ema_coeff", "a number in (0, 1)", self.ema_coeff)
        for name, choices in (
            ("scorer", ("bam", "mlp")),
            ("feature_transform", ("none", "log")),
            ("selection", ("ragged", "reference")),
            ("budget", ("per_head", "per_layer", "global")),
        ):
            value = getattr(self, name)
            if value not in choices:
                _fail(name, " or ".join(repr(choice) for choice in choices), value)
        for name in ("mlp_bias", "mlp_residual_first", "protect_newest"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                _fail(name, "a bool", value)
        for name, least in (
            ("mlp_hidden", 1),
            ("mlp_depth", 1),
            ("sink_tokens", 0),
            ("recent_tokens", 0),
        ):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                _fail(name, f"an int of at least {least}", value)
        if not _is_number(self.log_eps) or not 0.0 < self.log_eps < math.inf:
            _fail("log_eps", "a positive number", self.log_eps)
        if self.threshold is not None and not (
            _is_number(self.threshold) and math.isfinite(self.threshold)
        ):
            _fail("threshold", "a finite number or None", self.threshold)
        if self.cache_size is not None and not (_is_int(self.cache_size) and self.cache_size >= 1):
            _fail("cache_size", "an int of at least 1 or None", self.cache_size)
        if self.layer_shares is not None:
            check_layer_shares("NAMMConfig", self.layer_shares)

    def _check_combinations(self) -> None:
        if self.mlp_residual_first and self.mlp_depth > 1 and self.mlp_hidden != _NUM_FEATURES:
            _fail("mlp_hidden", f"{_NUM_FEATURES} with mlp_residual_first", self.mlp_hidden)
        if self.layer_shares is not None and self.cache_size is None:
            _fail("cache_size", "an int with layer_shares", self.cache_size)
        if self.selection == "reference" and self.budget == "per_layer":
            _fail("budget", "'per_head' or 'global' with selection 'reference'", self.budget)
        if self.budget == "per_layer" and self.cache_size is None:
            _fail("cache_size", "an int with budget 'per_layer'", self.cache_size)
        if self.budget == "global" and self.threshold is None:
            _fail("threshold", "a number with budget 'global'", self.threshold)
        if not self.protect_newest and (
            self.threshold is not None or self.cache_size is None or self.budget != "per_head"
        ):
            # Otherwise a segment could lose all of its tokens.
            _fail(
                "protect_newest",
                "True unless threshold is None, cache_size is set and budget is 'per_head'",
                self.protect_newest,
            )
        floors = self.sink_tokens + self.recent_tokens
        if self.cache_size is not None and floors > self.cache_size:
            _fail("cache_size", f"at least sink_tokens + recent_tokens = {floors}", self.cache_size)

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
        if not isinstance(values, Mapping):
            raise TypeError(f"NAMMConfig: values must be a mapping, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(
                f"NAMMConfig: keys must be among {', '.join(known)}, got {', '.join(unknown)}"
            )
        return cls(**values)

    def replace(self, **changes: Any) -> NAMMConfig:
        """A copy with some fields changed, validated again.

        Example:
            >>> NAMMConfig().replace(n_up=64).n_up
            64
        """
        return NAMMConfig.from_dict({**self.to_dict(), **changes})
