"""What was measured, for the eye: rich tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tasks import HELD_OUT_FAMILIES, UNSEEN_FAMILIES, RecordMix
from ..tasks.suite import HELD_OUT_TASKS
from .results import FULL, Interval, Results, Row

SHORT = {
    "single": "one\nkey",
    "multi_key": "many\nkeys",
    "multi_value": "many\nvals",
    "multi_query": "many\nasks",
    "paraphrase": "para-\nphr.",
    "overwritten": "new-\nest",
    "multi_turn": "talk",
    "many_shot": "many\nshot",
    "table": "ta-\nble",
    "code": "code",
    "variable_tracking": "vari-\nable",
    "unseen_family": "un-\nseen",
    "mapping": "map-\nping",
    "signature": "signa-\nture",
}
_COLORS = {
    **dict.fromkeys((*HELD_OUT_FAMILIES, *HELD_OUT_TASKS), "yellow"),
    **dict.fromkeys(UNSEEN_FAMILIES, "magenta"),
}

Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class _Column:
    """A heading, a value per row (None: not measured), and which end of it is good, if any."""

    heading: str
    value: Value
    form: Callable[[Row, float], str]
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
                self.form(row, value),
                style="bold green" if value == best and row.method != FULL else "",
            )
            for value, row in zip(values, rows, strict=True)
        ]


def _number(form: str) -> Callable[[Row, float], str]:
    return lambda _, value: form.format(value)


def answers_table(results: Results) -> Group:
    """Exact match by task and their mean, one part per context length and budget.

    The best eviction method of each column is bold.
    """
    names = dict.fromkeys(name for row in results.rows for name in row.tasks)
    columns = [
        _Column(
            SHORT.get(name, name), _exact_match(name), _number("{:.0f}"), max, _COLORS.get(name, "")
        )
        for name in names
    ]
    columns += [
        _Column("mean ± 95 %", _mean, _with_margin, max),
        _Column("% of full\n(95 %)", *_share(results), max),
    ]
    return _tables(results, columns)


def costs_table(results: Results) -> Group:
    """Text, bytes and time, one part per context length and budget."""
    kinds = dict.fromkeys(kind for row in results.rows for kind in row.bits_per_byte)
    columns = [_Column(f"{kind}\nbits/byte", _bits(kind), _number("{:.3f}"), min) for kind in kinds]
    columns += [
        _Column("over\nfull %", _over(results), _number("{:+.1f}"), min),
        _Column("kept\n%", _percent(lambda row: row.kept), _number("{:.1f}")),
        _Column("k+v\n%", _cost("kv_fraction", 100), _number("{:.0f}")),
        _Column("own\n%", _cost("own_fraction", 100), _number("{:.0f}")),
        _Column("all\n%", _cost("total_fraction", 100), _number("{:.0f}")),
        _Column("prefill\nms", _cost("prefill_seconds", 1e3), _number("{:,.0f}")),
        _Column("decode\nms/token", _cost("decode_seconds", 1e3), _number("{:.1f}")),
    ]
    return _tables(results, columns)


def _exact_match(task: str) -> Value:
    return lambda row: 100 * row.tasks[task].accuracy if task in row.tasks else None


def _percent(value: Value) -> Value:
    def scaled(row: Row) -> float | None:
        number = value(row)
        return None if number is None else 100 * number

    return scaled


_mean = _percent(lambda row: row.accuracy)


def _with_margin(row: Row, value: float) -> str:
    interval = row.accuracy_interval()
    margin = "" if interval is None else f" ±{50 * (interval[2] - interval[1]):4.1f}"
    return f"{value:.1f}{margin}"


def _share(results: Results) -> tuple[Value, Callable[[Row, float], str]]:
    def of_full(row: Row) -> Interval | None:
        full = results.full(row.length)
        return None if full is None or full is row else row.share_of(full)

    def value(row: Row) -> float | None:
        interval = of_full(row)
        return None if interval is None else 100 * interval[0]

    def form(row: Row, value: float) -> str:
        interval = of_full(row)
        assert interval is not None
        return f"{value:.0f} ({100 * interval[1]:.0f}-{100 * interval[2]:.0f})"

    return value, form


def _bits(kind: str) -> Value:
    return lambda row: row.bits_per_byte.get(kind)


def _over(results: Results) -> Value:
    def value(row: Row) -> float | None:
        full = results.full(row.length)
        return None if full is None or full is row else row.bits_over(full)

    return _percent(value)


def _cost(name: str, factor: float) -> Value:
    return lambda row: None if row.cost is None else factor * getattr(row.cost, name)


def _tables(results: Results, columns: Sequence[_Column]) -> Group:
    lines: list[RenderableType] = []
    for part in parts_of(results):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
        table.add_column("memory", no_wrap=True, min_width=12)
        for column in columns:
            heading = Text(column.heading, style=column.color)
            table.add_column(heading, justify="right", no_wrap=True)
        cells = zip(*(column.cells(part) for column in columns), strict=True)
        for row, line in zip(part, cells, strict=True):
            name = Text(row.method, style="bold" if row.method.startswith("NAMM") else "")
            table.add_row(name, *line, style="cyan" if row.method == FULL else "")
        lines += [Text(caption(part), style="italic"), table, Text()]
    return Group(*lines)


def parts_of(results: Results) -> Iterator[list[Row]]:
    """The rows of each context length and budget, the full cache's first in each."""
    for length, keep in dict.fromkeys((row.length, row.keep) for row in results.rows):
        here = [row for row in results.rows if (row.length, row.keep) == (length, keep)]
        full = results.full(length)
        if any(row.method != FULL for row in here):
            yield [full, *here] if full is not None else here
        elif all(row.method == FULL for row in results.rows if row.length == length):
            yield here


def caption(part: Sequence[Row]) -> str:
    """Length, budget and number of questions."""
    first, last = part[0], part[-1]
    kept = f", {100 * last.keep:.4g} % kept" if last.method != FULL else ""
    asked = f", {first.questions:,} questions" if first.questions else ""
    return f"{first.length:,} tokens{kept}{asked}"


# Sentences ---------------------------------------------------------------------------------------


def legend(n_up: int, mix: RecordMix | None, question_visible: bool = False) -> Text:
    """What was asked and what the columns mean.

    Args:
        n_up: tokens between two updates.
        mix: of the hidden records; None for readings.
        question_visible: in readings, whether the memory had seen the question.
    """
    text = Text(style="dim")
    if mix is None:
        text.append("Exact match in % of whole answers, with the chat template. ")
        text.append(
            "The memory has read the question when it forgets for the last time. "
            if question_visible
            else "The question comes when the memory has read the whole context. "
        )
        text.append("variable, unseen", style="yellow")
        text.append(": nothing was fitted or evolved on them. ")
    else:
        text.append(f"Asked at the end: {mix.num_records} records per context where they fit, ")
        text.append("stated once" if mix.mentions == 1 else f"each stated {mix.mentions} times")
        if mix.idle_per_1024:
            text.append(f", among {mix.idle_per_1024} per 1,024 tokens that nobody refers to again")
        text.append(". Exact match in %; ")
        text.append(", ".join(HELD_OUT_FAMILIES), style="yellow")
        text.append(": no memory was evolved on them; ")
        text.append(", ".join(UNSEEN_FAMILIES), style="magenta")
        text.append(": not even the model has met it. ")
    text.append(
        "±: half of a 95 % bootstrap interval over contexts; of full: paired by context. "
        f"kept: tokens after the last update / tokens seen (one update every {n_up} tokens). "
        "k+v: bytes of keys and values, free room included; own: the memory's own state; "
        "all: both; in % of the full cache, at the end of the prompt. Times: one prompt at a "
        "time, the fastest of interleaved rounds; decode has the updates in it. (2x): reads a "
        "context twice and forgets once, at its end."
    )
    return text


def verdict(results: Results) -> Text:
    """One sentence per context length and budget."""
    sentences = []
    for part in parts_of(results):
        here = {row.method: row for row in part}
        full, namm = here.pop(FULL, None), here.pop("NAMM", None)
        share = namm.share_of(full) if full is not None and namm is not None else None
        if share is None or full is None or namm is None:
            continue
        text = Text(f"{caption(part)}: NAMM answers ")
        text.append(f"{share[0]:.0%}", style="bold green")
        text.append(f" ({share[1]:.0%} to {share[2]:.0%}) of what the full cache answers")
        others = [(of_full[0], row.method) for row in part if (of_full := row.share_of(full))]
        others = [pair for pair in others if pair[1] in here]
        if others:
            best, method = max(others)
            text.append(f", the best baseline ({method}) {best:.0%}")
        if namm.cost is not None:
            text.append(f"; its keys and values take {namm.cost.kv_fraction:.0%} of the bytes")
        text.append(".")
        sentences.append(text)
    return Text("\n").join(sentences)
