"""Methods on the same contexts, a quarter kept, into a file that a stopped run goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from namm_ext import measure
from namm_ext.measure import tables
from namm_ext.measure.progress import progress
from rich.console import Console

LENGTH, KEEP = 1024, 0.25


def side_by_side(
    model: Any,
    tokenizer: Any,
    methods: Sequence[measure.Method],
    workload: measure.Workload,
    settings: dict[str, Any],
    path: Path,
) -> None:
    """Measure what the file does not have yet, without times, and print the table.

    Args:
        model, tokenizer: that read and answer.
        methods: what is compared, with the full cache.
        workload: contexts of ``LENGTH`` tokens.
        settings: what all figures depend on.
        path: of the JSON file.
    """
    results = measure.Results(settings, path)
    timing = measure.Timing(repeats=0)
    steps = measure.plan(model, tokenizer, methods, [workload], [KEEP], results, timing)
    console = Console()
    with progress(console, len(steps)) as show:
        measure.compare(steps, results, show)
    console.print(tables.answers_table(results))
