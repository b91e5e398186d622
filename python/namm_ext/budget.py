"""How much a memory keeps and who shares it: one frozen, validated value. Standard library only."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

SCOPES = ("per_head", "per_layer", "global")
SELECTIONS = ("ragged", "original")
_MOST_TOKENS = (1 << 31) - 1
_UNITS = {"": 1, **{p: 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}i": 1024**i for i, p in enumerate("kmgt", 1)}


def is_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an int; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float."""
    return is_int(value) or isinstance(value, float)


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as a dict, after making sure that all keys are fields of a dataclass.

    Raises:
        TypeError: if ``values`` is not a mapping.
        ValueError: for an unknown key.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__}: values must be a mapping, got {type(values).__name__}")
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(
            f"{cls.__name__}: keys must be among {', '.join(known)}, got {', '.join(unknown)}"
        )
    return dict(values)


def whole_tokens(number: float) -> int:
    """A share of tokens in whole ones: rounded down, but at least 1.

    Example:
        >>> whole_tokens(0.25 * 1023), whole_tokens(0.29 * 100), whole_tokens(0.1)
        (255, 29, 1)
    """
    return max(1, math.floor(number + 1e-6))


def parse_bytes(text: str) -> int:
    """Bytes as people write them: ``"2 GiB"``, ``"500 MB"``.

    Raises:
        ValueError: if the text is no number with a unit.

    Example:
        >>> parse_bytes("1.5 KiB"), parse_bytes("2MB")
        (1536, 2000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b\s*", text.lower())
    if found is None:
        raise ValueError(f"parse_bytes: text must be like '2 GiB' or '500 MB', got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def _is_bytes(size: object) -> bool:
    try:
        return isinstance(size, str) and parse_bytes(size) >= 1
    except ValueError:
        return False


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"Budget: {name} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class Budget:
    """What a policy may keep after an update. Goes with every policy.

    The newest token and the floors stay first, then the tokens with the best scores.

    Attributes:
        size: an int: tokens per KV head, as a mean over what ``scope`` covers. A float in (0, 1]:
            that share of the tokens a row has seen so far (1 - compression ratio). Bytes such as
            "2 GiB": as many tokens per head as a sequence can have in them after an update, all
            its layers with a memory together, with keys, values, the memory's own state, and room
            for the ``n_up`` tokens until the next update (a :class:`~namm_ext.NAMMCache` knows the
            sizes). None: no limit.
        scope: who shares it. "per_head": each head has its own part. "per_layer": the heads of a
            layer share ``size`` times the heads. "global": the layers share as well, as the
            policy's :class:`~namm_ext.policy.Calibration` divides it, and the heads within.
        layer_shares: parts of the layers, positive with mean 1, instead of equal ones: layer l
            has ``layer_shares[l]`` times the size. Not with "global".
        sink_tokens: tokens at the start of a sequence that always stay.
        recent_tokens: newest tokens that always stay, counted in original positions; a float is a
            share of the layer's tokens per head.
        threshold: only tokens with ``score >= threshold`` stay; None for no threshold.
        selection: "original" then fills each head of a layer to the count of its fullest head, as
            the released code of NAMM does; "ragged" does not.
        protect_newest: False lets the newest token go, which is plain top-k; needs a size,
            ``threshold=None`` and the scope "per_head".

    Raises:
        ValueError: if a field is outside its range or two of them contradict each other.

    Example:
        >>> Budget(256, scope="per_layer", sink_tokens=4)
        Budget(256, scope='per_layer', sink_tokens=4)
        >>> Budget(1.5)
        Traceback (most recent call last):
        ValueError: Budget: size must be an int of at least 1 (tokens per head), a float in (0, 1] \
(the share to keep, 1 - compression ratio), bytes such as '2 GiB', or None, got 1.5
    """

    def __new__(cls, *args: Any, **fields: Any) -> Budget:
        if "compression_ratio" in fields:
            raise TypeError(
                "Budget: compression_ratio is the share that goes, size the one that stays: "
                f"Budget(0.25) for a ratio of 0.75, got {fields['compression_ratio']!r}"
            )
        return super().__new__(cls)

    size: int | float | str | None = None
    scope: str = "per_head"
    layer_shares: tuple[float, ...] | None = None
    sink_tokens: int = 0
    recent_tokens: int | float = 0
    threshold: float | None = None
    selection: str = "ragged"
    protect_newest: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.layer_shares, list):  # as JSON has it
            object.__setattr__(self, "layer_shares", tuple(self.layer_shares))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        size, recent, shares = self.size, self.recent_tokens, self.layer_shares
        tokens = is_int(size) and size >= 1
        share = isinstance(size, float) and 0.0 < size <= 1.0
        if not (size is None or tokens or share or _is_bytes(size)):
            _fail(
                "size",
                "an int of at least 1 (tokens per head), a float in (0, 1] (the share to keep, "
                "1 - compression ratio), bytes such as '2 GiB', or None",
                size,
            )
        for name, choices in (("scope", SCOPES), ("selection", SELECTIONS)):
            if getattr(self, name) not in choices:
                _fail(name, " or ".join(repr(choice) for choice in choices), getattr(self, name))
        if shares is not None and not (
            isinstance(shares, tuple)
            and all(is_number(share) and 0.0 < share < math.inf for share in shares)
            and math.isclose(sum(shares), len(shares), rel_tol=1e-6)
        ):
            _fail("layer_shares", "positive numbers with mean 1, one per layer", shares)
        if not is_int(self.sink_tokens) or self.sink_tokens < 0:
            _fail("sink_tokens", "an int of at least 0", self.sink_tokens)
        if not (is_int(recent) and recent >= 0) and not (
            isinstance(recent, float) and 0.0 <= recent <= 1.0
        ):
            _fail("recent_tokens", "an int of at least 0 or a float in [0, 1]", recent)
        if self.threshold is not None and not (
            is_number(self.threshold) and math.isfinite(self.threshold)
        ):
            _fail("threshold", "a finite number or None", self.threshold)
        for name in ("size", "sink_tokens", "recent_tokens"):
            value = getattr(self, name)
            if is_number(value) and value > _MOST_TOKENS:
                _fail(name, f"at most {_MOST_TOKENS}, as positions are int32", getattr(self, name))
        if not isinstance(self.protect_newest, bool):
            _fail("protect_newest", "a bool", self.protect_newest)

    def _check_combinations(self) -> None:
        if self.size is None and self.scope != "per_head":
            _fail("size", f"a number with scope {self.scope!r}", self.size)
        if self.size is None and self.layer_shares is not None:
            _fail("size", "a number with layer_shares", self.size)
        if self.layer_shares is not None and self.scope == "global":
            _fail("layer_shares", "None with scope 'global'", self.layer_shares)
        if self.selection == "original" and self.scope != "per_head":
            _fail("scope", "'per_head' with selection 'original'", self.scope)
        if not self.protect_newest and (
            self.threshold is not None or self.size is None or self.scope != "per_head"
        ):
            # Otherwise a segment could lose all of its tokens.
            _fail(
                "protect_newest",
                "True unless threshold is None, size is set and scope is 'per_head'",
                self.protect_newest,
            )

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"Budget({', '.join(changed).removeprefix('size=')})"

    @property
    def couples_heads(self) -> bool:
        """Whether what one head keeps depends on the scores of the others."""
        return self.scope != "per_head" or self.selection == "original"

    def layer_share(self, layer_idx: int) -> float:
        """What ``layer_shares`` has for a layer; 1 without.

        Raises:
            ValueError: if there is no entry for the layer.
        """
        if self.layer_shares is None:
            return 1.0
        if not 0 <= layer_idx < len(self.layer_shares):
            raise ValueError(
                "Budget: layer_shares must have an entry for every layer, got "
                f"{len(self.layer_shares)} entries and layer {layer_idx}"
            )
        return self.layer_shares[layer_idx]

    def floors(self, num_tokens: int) -> tuple[int, int]:
        """Sink and recent tokens of a head that may hold ``num_tokens``.

        Example:
            >>> Budget(9, sink_tokens=4, recent_tokens=0.75).floors(9)
            (4, 5)
        """
        sinks, recent = min(self.sink_tokens, num_tokens), self.recent_tokens
        if isinstance(recent, float):
            recent = math.floor(recent * num_tokens + 1e-6)
        return sinks, min(recent, num_tokens - sinks)

    def of_context(self, length: int) -> Budget:
        """The same budget in whole tokens, if it is a share, for a context of ``length`` tokens.

        A fixed number from the start, unlike a share of what was seen so far, which grows.

        Example:
            >>> Budget(0.25).of_context(1024)
            Budget(256)
        """
        if not isinstance(self.size, float):
            return self
        return dataclasses.replace(self, size=whole_tokens(self.size * length))

    def in_tokens(self, *, fixed: int, per_token: int) -> Budget:
        """The same budget in tokens per head, if it is in bytes.

        Args:
            fixed: bytes that a sequence has without any token, over all its layers.
            per_token: bytes of one token in every head of every layer.

        Raises:
            ValueError: if there is no room for a token.

        Example:
            >>> Budget("1 KiB").in_tokens(fixed=24, per_token=100)
            Budget(10)
        """
        if not isinstance(self.size, str):
            return self
        size = (parse_bytes(self.size) - fixed) // per_token
        if size < 1:
            _fail("size", f"at least {fixed + per_token} bytes for this model", self.size)
        return dataclasses.replace(self, size=min(size, _MOST_TOKENS))

    def to_dict(self) -> dict[str, Any]:
        """All fields as a plain dict, ready for JSON; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """Build a budget from a mapping; missing fields take their defaults.

        Raises:
            TypeError: if ``values`` is not a mapping.
            ValueError: for an unknown key or a value outside its range.
        """
        return cls(**known_fields(cls, values))
