"""How far a long run is: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: Called with how much is done and what comes.
Show = Callable[[float, str], None]


@contextmanager
def progress(console: Console, total: float) -> Iterator[Show]:
    """Show progress for the length of a ``with`` block.

    Args:
        console: to show it on.
        total: how much there is to do.
    """
    if not console.is_terminal:
        yield _Lines(console, total).show
        return
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


class _Lines:
    """The first thing that is done, and one every ``pause`` seconds."""

    pause = 15.0

    def __init__(self, console: Console, total: float) -> None:
        self.console, self.total = console, total
        self.began = time.monotonic()
        self.shown = -self.pause

    def show(self, done: float, text: str) -> None:
        elapsed = time.monotonic() - self.began
        if elapsed - self.shown >= self.pause:
            self.shown = elapsed
            self.console.print(
                f"{elapsed:5.0f} s  {done:.0f}/{self.total:.0f}  {text}",
                style="dim",
                highlight=False,
            )
