"""``namm train-lm``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .shared import Output, Threads, make_console, need, set_threads


def train_lm(
    output: Output,
    seed: Annotated[int, typer.Option(help="Weights and data depend on this seed.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only two steps are made, to see that it runs.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train a bundled language model again. It takes half an hour on two cores."""
    need("transformers", "tokenizers", "safetensors")
    set_threads(threads)
    from ..zoo import train_lm as recipe

    console = make_console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            task = progress.add_task("first steps", total=None)

            def on_log(entry: dict[str, Any]) -> None:
                progress.update(
                    task,
                    total=entry["total_steps"],
                    completed=entry["step"],
                    description=(
                        f"text loss {entry['text_loss']:.3f}, answers "
                        f"{entry['answer_token_accuracy']:.0%}"
                    ),
                )

            folder = recipe.train_lm(output, seed=seed, quick=quick, on_log=on_log)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    console.print(f"Saved in [bold]{folder}[/], figures in metrics.json")
