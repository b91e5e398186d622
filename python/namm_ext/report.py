"""What a memory holds, per layer and head, against the full cache; measured on live tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ragged import RaggedKV


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: its index in the model.
        seen: real tokens of each batch row.
        kept: ``[B][H]`` survivors of the last update of each head (all tokens before the first).
        live: ``[B][H]`` tokens held now: kept and those since the last update.
        num_updates: how often the layer was rebuilt.
        kv_bytes_live: k and v of live tokens. kv_bytes: k and v as allocated, free room included.
        memory_bytes: the policy's state, positions, windows and index tensors.
        recorded_bytes: what is only there so that ``crop`` can undo updates.
        peak_kv_bytes, peak_memory_bytes, peak_bytes: the most the layer ever held, the moment of
            an update (old and new store) included.
        full_bytes: k and v of a stock cache after as many tokens, padding included.
    """

    layer: int
    seen: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    live: tuple[tuple[int, ...], ...]
    num_updates: int
    kv_bytes_live: int
    kv_bytes: int
    memory_bytes: int
    recorded_bytes: int
    peak_kv_bytes: int
    peak_memory_bytes: int
    peak_bytes: int
    full_bytes: int

    @classmethod
    def of(cls, kv: RaggedKV, layer: int, padded: int) -> LayerReport:
        """Measure a store that has taken in ``padded`` columns."""
        h = kv.num_kv_heads
        store, lengths = kv.store.segments, kv.lengths
        row_bytes = (store.k.shape[1] + store.v.shape[1]) * store.k.element_size()
        kept = [
            n if kv.seen[s // h] >= kv.n_up else lengths[s] for s, n in enumerate(kv.store.kept)
        ]
        memory_tensors = (
            store.pos, store.state, store.cu_seqlens_k, store.seqused_k,
            kv.q_window, kv.lse_window,
        )  # fmt: skip
        return cls(
            layer=layer,
            seen=kv.seen,
            kept=_by_row(kept, h),
            live=_by_row(lengths, h),
            num_updates=kv.num_updates,
            kv_bytes_live=sum(lengths) * row_bytes,
            kv_bytes=sum(t.untyped_storage().nbytes() for t in (store.k, store.v)),
            memory_bytes=sum(t.untyped_storage().nbytes() for t in memory_tensors),
            recorded_bytes=kv.recorded_bytes,
            peak_kv_bytes=kv.ledger.peak_kv,
            peak_memory_bytes=kv.ledger.peak_memory,
            peak_bytes=kv.ledger.peak,
            full_bytes=kv.batch_size * h * padded * row_bytes,
        )

    @property
    def tokens_seen(self) -> int:
        """Tokens a full cache would hold, over rows and heads."""
        return sum(self.seen) * len(self.kept[0])

    @property
    def tokens_kept(self) -> int:
        """Survivors of the last update, over rows and heads."""
        return sum(map(sum, self.kept))

    @property
    def tokens_judged(self) -> int:
        """Tokens seen up to the last update (all tokens before the first), over rows and heads."""
        return self.tokens_seen - self.tokens_live + self.tokens_kept

    @property
    def tokens_live(self) -> int:
        """Tokens held now, over rows and heads."""
        return sum(map(sum, self.live))


_TOTALS = (
    *("tokens_seen", "tokens_judged", "tokens_kept", "tokens_live"),
    *("kept_fraction", "live_fraction"),
    *("kv_bytes_live", "kv_bytes", "memory_bytes", "recorded_bytes", "total_bytes"),
    *("sliding_bytes", "full_bytes"),
    *("kv_fraction", "total_fraction", "peak_kv_bytes", "peak_memory_bytes", "peak_bytes"),
)


def _by_row(values: Any, num_heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values[i : i + num_heads]) for i in range(0, len(values), num_heads))


@dataclass(frozen=True)
class Report:
    """A whole cache: its layers and the totals.

    ``kv_bytes``, ``memory_bytes`` and ``recorded_bytes`` are allocated bytes, ``total_bytes`` is
    their sum; the peaks are of the model as a whole. Stock layers of a hybrid count as
    ``sliding_bytes``, those with a recurrent state too.
    """

    policy: str
    fingerprint: str
    layers: tuple[LayerReport, ...]
    sliding_bytes: int
    full_bytes: int
    peak_kv_bytes: int
    peak_memory_bytes: int
    peak_bytes: int

    @property
    def tokens_seen(self) -> int:
        """Tokens a full cache would hold, over layers, rows and heads."""
        return sum(layer.tokens_seen for layer in self.layers)

    @property
    def tokens_kept(self) -> int:
        """Survivors of the last updates."""
        return sum(layer.tokens_kept for layer in self.layers)

    @property
    def tokens_judged(self) -> int:
        """Tokens seen up to the last updates."""
        return sum(layer.tokens_judged for layer in self.layers)

    @property
    def tokens_live(self) -> int:
        """Tokens held now."""
        return sum(layer.tokens_live for layer in self.layers)

    @property
    def kept_fraction(self) -> float:
        """Tokens kept by the last update / tokens seen up to it; 1 before any token."""
        return self.tokens_kept / self.tokens_judged if self.tokens_judged else 1.0

    @property
    def live_fraction(self) -> float:
        """Tokens held now / tokens seen; 1 before any token."""
        return self.tokens_live / self.tokens_seen if self.tokens_seen else 1.0

    @property
    def kv_bytes_live(self) -> int:
        """k and v of live tokens."""
        return sum(layer.kv_bytes_live for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        """k and v as allocated, room for new tokens included."""
        return sum(layer.kv_bytes for layer in self.layers) + self.sliding_bytes

    @property
    def memory_bytes(self) -> int:
        """Everything else the memory holds: state, positions, windows, index tensors."""
        return sum(layer.memory_bytes for layer in self.layers)

    @property
    def recorded_bytes(self) -> int:
        """What is only there so that ``crop`` can undo updates."""
        return sum(layer.recorded_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.kv_bytes + self.memory_bytes + self.recorded_bytes

    @property
    def kv_fraction(self) -> float:
        """Allocated k and v against the full cache; 1 before any token."""
        return self.kv_bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def total_fraction(self) -> float:
        """Everything against the full cache; 1 before any token."""
        return self.total_bytes / self.full_bytes if self.full_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data: ``policy``, ``layers`` and ``totals``."""
        totals = {name: getattr(self, name) for name in _TOTALS}
        return {
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            "layers": [asdict(layer) for layer in self.layers],
            "totals": totals,
        }

    def __str__(self) -> str:
        """One line per layer; heads show the smallest and largest number of tokens kept."""
        rows = [["layer", "seen", "kept", "per head", "updates", "k+v", "memory", "peak", "full"]]

        def add(x: Any, layer: str, heads: str, updates: str) -> None:
            sizes = (x.kv_bytes, x.memory_bytes, x.peak_bytes, x.full_bytes)
            counts = (str(x.tokens_seen), str(x.tokens_kept))
            rows.append([layer, *counts, heads, updates, *map(size_of, sizes)])

        for x in self.layers:
            heads = [n for row in x.kept for n in row]
            add(x, str(x.layer), f"{min(heads)}-{max(heads)}", str(x.num_updates))
        add(self, "all", f"{self.kept_fraction:.1%}", "")
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        lines.append(
            f"{self.policy}: k and v take {self.kv_fraction:.1%} of the full cache, "
            f"{self.total_fraction:.1%} with the memory's own state"
        )
        return "\n".join(lines)


def size_of(num_bytes: int) -> str:
    """Bytes as people read them."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
