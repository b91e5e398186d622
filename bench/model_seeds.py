#!/usr/bin/env python3
"""One figure over models of several seeds: what a memory keeps of its model's answers, zero-shot.

    python -m namm_ext.zoo.train_video runs/clips-1 --seed 1
    python bench/video.py --model runs/clips-1 --json bench/results/video-seed1.json
    python bench/model_seeds.py bench/results/video.json bench/results/video-seed*.json

Prints a Markdown table, best mean first: a column per file of ``video.py`` or ``control.py`` (the
one without random actions), percent of the full cache at one budget, and mean and range over them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FULL = "full cache"


def of_full(path: Path, keep: float) -> dict[str, float]:
    """Percent of the full cache by method; the full cache's own figure beside it.

    Raises:
        ValueError: if nothing was measured at this budget.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if row.get("noise", 0) == 0]
    video = "frames" in content["settings"]
    scale = 100 if video else 1
    found = {row["method"]: scale * row["of_full"][0] for row in rows if row["keep"] == keep}
    if not found:
        raise ValueError(f"--keep must be a budget of {path}, got {keep}")
    full = next(row for row in rows if row["method"] == FULL)
    found[FULL] = 100 * full["accuracy"] if video else full["return"][0]
    return found


def table(columns: list[dict[str, float]], keep: float) -> str:
    """Methods that all columns have, best mean first.

    Example:
        >>> print(table([{FULL: 90.0, "H2O": 80.0}, {FULL: 70.0, "H2O": 90.0}], 0.25))
        | % of full at 25 % kept | seed 0 | seed 1 | mean | range |
        |---|---:|---:|---:|---:|
        | full cache itself | 90 | 70 | 80 | 70-90 |
        | H2O | 80 | 90 | 85 | 80-90 |
    """
    names = [name for name in columns[0] if all(name in column for column in columns)]
    names.sort(key=lambda name: (name != FULL, -sum(column[name] for column in columns)))
    heads = " | ".join(f"seed {i}" for i in range(len(columns)))
    lines = [
        f"| % of full at {100 * keep:g} % kept | {heads} | mean | range |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for name in names:
        values = [column[name] for column in columns]
        cells = " | ".join(f"{value:.0f}" for value in values)
        label = f"{name} itself" if name == FULL else name
        mean, span = sum(values) / len(values), f"{min(values):.0f}-{max(values):.0f}"
        lines.append(f"| {label} | {cells} | {mean:.0f} | {span} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="of seeds 0, 1 and so on")
    parser.add_argument("--keep", type=float, default=0.25)
    args = parser.parse_args()
    print(table([of_full(path, args.keep) for path in args.files], args.keep))


if __name__ == "__main__":
    main()
