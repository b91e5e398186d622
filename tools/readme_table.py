#!/usr/bin/env python3
"""Writes the README's tables of memories from what ``namm demo --json`` measured.

    namm demo --json bench/results/demo.json && tools/readme_table.py bench/results/demo.json

The blocks between ``<!-- demo LENGTH -->`` and ``<!-- end -->`` are replaced; ``--check`` only says
whether they are what the file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
HEADINGS = ("known", "held out", "unseen", "mean", "bits/byte", "kept", "k+v", "+ own")


def table(content: dict[str, Any], length: int) -> str:
    """A Markdown table of the rows of one context length."""
    rows = [row for row in content["rows"] if row["length"] == length]
    if not rows:
        raise ValueError(f"length must be one of the measured ones, got {length}")
    lines = [
        f"| {length:,} tokens | " + " | ".join(HEADINGS) + " | prefill | decode |",
        "|---|" + "---:|" * (len(HEADINGS) + 2),
    ]
    for row in rows:
        bold = row["method"] == "NAMM"
        lines.append("| " + " | ".join(_cells(row, content["families"], bold)) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any], groups: dict[str, list[str]], bold: bool) -> list[str]:
    def mean(names: list[str]) -> float:
        return 100 * sum(row["exact_match"][name] for name in names) / len(names)

    special = {name for names in groups.values() for name in names}
    known = [name for name in row["exact_match"] if name not in special]
    cost = row["cost"]
    accuracy = f"{100 * row['accuracy']:.1f}"
    return [
        f"**{row['method']}**" if bold else row["method"],
        *(f"{mean(names):.0f}" for names in (known, groups["held_out"], groups["unseen"])),
        f"**{accuracy}**" if bold else accuracy,
        f"{row['bits_per_byte']:.3f}",
        *(f"{100 * value:.0f} %" for value in (row["kept"], cost["kv_fraction"])),
        f"{100 * cost['total_fraction']:.0f} %",
        f"{1e3 * cost['prefill_seconds']:.0f} ms",
        f"{1e3 * cost['decode_seconds']:.1f} ms",
    ]


def filled(text: str, content: dict[str, Any]) -> str:
    """The README with its blocks replaced."""
    return re.sub(
        r"(<!-- demo (\d+) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{table(content, int(m[2]))}\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = filled(old, json.loads(arguments.json.read_text(encoding="utf-8")))
    if not arguments.check:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"README.md does not show {arguments.json}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
