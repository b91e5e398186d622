#!/usr/bin/env python3
"""Writes the tables of README.md and docs/benchmark.md from what ``namm compare --json`` measured.

    namm compare --model smollm2-135m --json bench/results/smollm2-135m.json
    tools/readme_table.py

A block begins with ``<!-- NAME LENGTH KEEP -->``, which stands for ``bench/results/NAME.json``, a
context length and a budget, and ends with ``<!-- end -->``; with ``costs`` behind the budget it is
bytes and times alone, with ``best`` only the four rules that answer most beside NAMM. A block whose
file is missing stays as it is. ``--check`` only says whether the tables are what the files give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/benchmark.md")
BLOCK = re.compile(
    r"(<!-- (\S+) (\d+) ([\d.]+)( costs| best)? -->\n).*?(<!-- end -->)", flags=re.DOTALL
)
FULL = "full cache"

# Columns of tasks; those that a file does not have are left out.
GROUPS = {
    "needles": ("single", "multi_key", "multi_value", "multi_query"),
    "facts": ("paraphrase", "overwritten", "multi_turn"),
    "lists, code": ("many_shot", "table", "code"),
    "known": ("assign", "prose", "mapping", "latest"),
    "held out": ("variable_tracking", "unseen_family", "call", "signature"),
    "unseen": ("export",),
}


def table(content: dict[str, Any], length: int, keep: float, what: str = "") -> str:
    """A Markdown table of the full cache and the rows of one length and budget, NAMM first.

    ``what`` may be "costs" or "best", as in a block.

    Raises:
        ValueError: if none was measured.
    """
    here = [row for row in content["rows"] if row["length"] == length]
    full = next((row for row in here if row["method"] == FULL), None)
    rows = [row for row in here if row["method"] != FULL and row["keep"] == keep]
    if full is None or not rows:
        raise ValueError(f"{length} tokens and {keep} kept must be measured, with the full cache")
    rows.sort(key=lambda row: (not row["method"].startswith("NAMM"), -(row["accuracy"] or 0)))
    if what == "best":
        ours = sum(row["method"].startswith("NAMM") for row in rows)
        rows = rows[: ours + 4]
    if what == "costs":
        return _costs_table(content, length, keep, (full, *rows))
    groups = {name: [t for t in tasks if t in full["tasks"]] for name, tasks in GROUPS.items()}
    groups = {name: tasks for name, tasks in groups.items() if tasks}
    asked = sum(task["questions"] for task in full["tasks"].values())
    headings = (
        f"{length:,} tokens, {100 * keep:.4g} % kept, {asked} questions",
        *groups,
        *("mean", "% of full (95 %)", "bits/byte", "kept", "k+v", "+ own", "prefill", "decode"),
    )
    lines = [
        "| " + " | ".join(headings) + " |",
        "|---|" + "---:|" * (len(headings) - 1),
        *("| " + " | ".join(_cells(row, groups)) + " |" for row in (full, *rows)),
    ]
    return "\n".join(lines)


def _costs_table(
    content: dict[str, Any], length: int, keep: float, rows: tuple[dict[str, Any], ...]
) -> str:
    dtype = content["settings"]["dtype"]
    full = rows[0]["cost"]
    lines = [
        f"| {length:,} tokens, {100 * keep:.4g} % kept, {dtype} | k+v | + own | prefill | of full "
        "| decode | of full |",
        "|---|" + "---:|" * 6,
    ]
    for row in rows:
        cost = row["cost"]
        cells = [
            row["method"],
            *(f"{100 * cost[k]:.0f} %" for k in ("kv_fraction", "total_fraction")),
        ]
        for name, digits in (("prefill_seconds", 0), ("decode_seconds", 1)):
            cells.append(f"{1e3 * cost[name]:,.{digits}f} ms")
            cells.append("-" if cost is full else f"{cost[name] / full[name]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any], groups: dict[str, list[str]]) -> list[str]:
    def mean(tasks: list[str]) -> float:
        matches = [row["tasks"][task]["exact_match"] for task in tasks]
        return 100 * sum(sum(shares) / len(shares) for shares in matches) / len(tasks)

    is_full, bold = row["method"] == FULL, row["method"] == "NAMM"
    accuracy, of_full = f"{100 * row['accuracy']:.1f}", "-"
    if row["share_of_full"] and not is_full:
        value, low, high = (100 * share for share in row["share_of_full"])
        of_full = f"{value:.0f} ({low:.0f}-{high:.0f})"
    text, cost = "-", row["cost"]
    if row["bits_over_full"] is not None and not is_full:
        text = f"{100 * row['bits_over_full']:+.1f} %"
    elif row["bits_per_byte"]:
        text = f"{sum(row['bits_per_byte'].values()) / len(row['bits_per_byte']):.3f}"
    return [
        f"**{row['method']}**" if bold else row["method"],
        *(f"{mean(tasks):.0f}" for tasks in groups.values()),
        f"**{accuracy}**" if bold else accuracy,
        f"**{of_full}**" if bold else of_full,
        text,
        f"{100 * row['kept']:.0f} %",
        *(
            (
                f"{100 * cost['kv_fraction']:.0f} %",
                f"{100 * cost['total_fraction']:.0f} %",
                f"{1e3 * cost['prefill_seconds']:,.0f} ms",
                f"{1e3 * cost['decode_seconds']:.1f} ms",
            )
            if cost
            else "-" * 4
        ),
    ]


def filled(text: str, folder: Path) -> str:
    """A page with the blocks replaced whose files are in the folder."""

    def block(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        if not path.is_file():
            return match[0]
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = table(content, int(match[3]), float(match[4]), (match[5] or "").strip())
        return f"{match[1]}{rows}\n{match[6]}"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = filled(old, ROOT / "bench/results")
        if new != old:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new, encoding="utf-8")
    if check and stale:
        print(f"{', '.join(stale)}: not what bench/results has", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
