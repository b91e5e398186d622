"""What `compare` and `evolve` measured, for the eye: rich tables, sentences and a text chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import FULL, Row
from .tasks import HELD_OUT_FAMILIES, UNSEEN_FAMILIES, RecordMix

WIDTH = 96
"""Characters a table needs to show every family; narrower ones show groups of families."""

_HEADINGS = {"mapping": "map-\nping", "signature": "signa-\nture"}
_COLORS = {
    **dict.fromkeys(HELD_OUT_FAMILIES, "yellow"),
    **dict.fromkeys(UNSEEN_FAMILIES, "magenta"),
}


@dataclass(frozen=True)
class _Column:
    """A heading, a value per row (None: not measured), and which end of it is good, if any."""

    heading: str
    value: Callable[[Row], float | None]
    form: str
    better: Callable[..., float] | None = None
    color: str = ""

    def cells(self, rows: Sequence[Row]) -> list[Text]:
        values = [self.value(row) for row in rows]
        evicting = [
            value
            for value, row in zip(values, rows, strict=True)
            if row.method != FULL and value is not None
        ]
        best = self.better(evicting) if self.better and evicting else None
        return [
            Text("·", style="dim")
            if value is None
            else Text(
                self.form.format(value),
                style="bold green" if value == best and row.method != FULL else "",
            )
            for value, row in zip(values, rows, strict=True)
        ]


def comparison_table(rows: Sequence[Row], keep_fraction: float, width: int = WIDTH) -> Table:
    """Quality, bytes and time of every method, one part per context length.

    The best eviction method of each quality column is bold.

    Args:
        rows: from `compare`.
        keep_fraction: the budget, for the heading.
        width: of the terminal; under ``WIDTH``, families are shown in groups.
    """
    families = list(dict.fromkeys(name for row in rows for name in row.exact_match))
    columns = _families(families) if width >= WIDTH else _groups(families)
    columns += _MEASURES
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    table.add_column(f"memory,\n{keep_fraction:.0%} kept", no_wrap=True, min_width=12)
    for column in columns:
        heading = Text(column.heading, style=column.color)
        table.add_column(heading, justify="right", no_wrap=True)
    lengths = list(dict.fromkeys(row.length for row in rows))
    for length in lengths:
        here = [row for row in rows if row.length == length]
        table.add_row(Text(f"{length:,} tokens", style="dim italic"))
        for row, cells in zip(
            here, zip(*(c.cells(here) for c in columns), strict=True), strict=True
        ):
            name = Text(row.method, style="bold" if row.method.startswith("NAMM") else "")
            table.add_row(name, *cells, style="cyan" if row.method == FULL else "")
        if length != lengths[-1]:
            table.add_section()
    return table


def _match(families: Sequence[str]) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        values = [row.exact_match[name] for name in families if name in row.exact_match]
        return 100 * sum(values) / len(values) if values else None

    return value


def _families(families: Sequence[str]) -> list[_Column]:
    return [
        _Column(_HEADINGS.get(name, name), _match([name]), "{:.0f}", max, _COLORS.get(name, ""))
        for name in families
    ]


def _groups(families: Sequence[str]) -> list[_Column]:
    groups: dict[str, list[str]] = {}
    for name in families:
        groups.setdefault(_COLORS.get(name, ""), []).append(name)
    headings = {"": "known\ntasks", "yellow": "held-\nout", "magenta": "un-\nseen"}
    return [
        _Column(headings[color], _match(names), "{:.0f}", max, color)
        for color, names in groups.items()
    ]


def _cost(name: str, factor: float) -> Callable[[Row], float | None]:
    return lambda row: None if row.cost is None else factor * getattr(row.cost, name)


_MEASURES = [
    _Column("mean", lambda r: None if r.accuracy is None else 100 * r.accuracy, "{:.1f}", max),
    _Column("bits/\nbyte", lambda r: r.bits_per_byte, "{:.3f}", min),
    _Column("kept\n%", lambda r: None if r.kept is None else 100 * r.kept, "{:.1f}"),
    _Column("k+v\n%", _cost("kv_fraction", 100), "{:.0f}"),
    _Column("own\n%", _cost("own_fraction", 100), "{:.0f}"),
    _Column("all\n%", _cost("total_fraction", 100), "{:.0f}"),
    _Column("pre-\nfill", _cost("prefill_seconds", 1e3), "{:.0f}"),
    _Column("de-\ncode", _cost("decode_seconds", 1e3), "{:.1f}"),
]


def legend(n_up: int, mix: RecordMix) -> Text:
    """What was asked and what the columns mean, for memories that update every ``n_up`` tokens."""
    text = Text(style="dim")
    text.append(f"Asked at the end: {mix.num_records} records per context, ")
    text.append("stated once" if mix.mentions == 1 else f"each stated {mix.mentions} times")
    if mix.idle_per_1024:
        text.append(f", among {mix.idle_per_1024} per 1,024 tokens that nobody refers to again")
    text.append(". Exact match in %; ")
    text.append(", ".join(HELD_OUT_FAMILIES), style="yellow")
    text.append(": no memory was evolved on them; ")
    text.append(", ".join(UNSEEN_FAMILIES), style="magenta")
    text.append(
        ": not even the model has met it. kept: tokens after the last update / tokens seen (one "
        f"update every {n_up} tokens). k+v: live bytes of keys and values, free room included; "
        "own: the memory's own state; all: both; in % of the full cache, at the end of the "
        "prompt. prefill: ms; decode: ms per token, updates included; one prompt at a time."
    )
    return text


def verdict(rows: Sequence[Row]) -> Text:
    """One sentence per context length."""
    sentences = []
    for length in dict.fromkeys(row.length for row in rows):
        here = {row.method: row for row in rows if row.length == length}
        full, namm = here.pop(FULL, None), here.pop("NAMM", None)
        if full is None or namm is None or not full.accuracy or namm.accuracy is None:
            continue
        text = Text(f"{length:,} tokens: NAMM answers ")
        text.append(f"{namm.accuracy / full.accuracy:.0%}", style="bold green")
        text.append(" of what the full cache answers")
        scored = [(row.accuracy, row.method) for row in here.values() if row.accuracy is not None]
        if scored:
            accuracy, method = max(scored)
            text.append(f", the best baseline ({method}) {accuracy / full.accuracy:.0%}")
        if namm.cost is not None:
            text.append(f"; its keys and values take {namm.cost.kv_fraction:.0%} of the bytes")
        text.append(".")
        sentences.append(text)
    return Text("\n").join(sentences)


def chart(
    curve: Sequence[tuple[int, float]], levels: dict[str, float], width: int = 60, height: int = 12
) -> Text:
    """Exact match over generations, with the level of every other memory as a dashed line.

    Args:
        curve: ``(generation, value in [0, 1])``, increasing in the generation.
        levels: values by name.
        width, height: of the plot in characters.
    """
    top = max([value for _, value in curve] + list(levels.values()) + [0.1])
    last = max(curve[-1][0], 1)

    def line_of(value: float) -> int:
        return round((1 - value / top) * (height - 1))

    named: dict[int, list[str]] = {}
    for name, value in sorted(levels.items(), key=lambda item: -item[1]):
        named.setdefault(line_of(value), []).append(f"{name} {value:.0%}")
    dots = {round(g / last * (width - 1)): line_of(value) for g, value in curve}
    text = Text(no_wrap=True)
    for line in range(height):
        percent = f"{top * (1 - line / (height - 1)):>6.0%} " if line % 3 == 0 else " " * 7
        text.append(percent + "│", style="dim")
        names = named.get(line, [])
        style = "cyan" if any(name.startswith(FULL) for name in names) else "yellow"
        for column in range(width):
            if dots.get(column) == line:
                text.append("●", style="bold green")
            else:
                text.append("╌" if names else " ", style=f"dim {style}")
        text.append(f" {_some(names)}\n", style=style)
    text.append(" " * 7 + "└" + "─" * width + "\n", style="dim")
    text.append(" " * 8 + f"0{f'generation {last}':>{width - 1}}", style="dim")
    return text


def _some(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many more there are."""
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more
