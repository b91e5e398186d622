"""``namm fit`` and ``namm calibrate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .shared import (
    Device,
    DType,
    ModelArgument,
    Policy,
    Threads,
    load_model,
    load_policy,
    make_console,
    set_threads,
)

if TYPE_CHECKING:
    from ..fitting import Text

#: What an interrupted fit goes on from.
STATE_FILE = "gate.npz"
#: Subfolder of the memory without its scorer.
GATE_ALONE = "gate-alone"

Folder = Annotated[Path, typer.Argument(help="The memory is saved in this folder.")]
Own = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="The texts are the files of this folder.",
        show_default="the standard library's, and tasks hidden in it",
    ),
]
Length = Annotated[int, typer.Option(help="A text has so many tokens.", min=64)]
Seed = Annotated[int, typer.Option(help="The choice of texts depends on this seed.")]


def fit(
    model: ModelArgument,
    output: Folder,
    text: Own = None,
    length: Length = 1024,
    count: Annotated[int, typer.Option(help="So many texts are read.", min=2)] = 72,
    scorer: Annotated[
        str,
        typer.Option(help="The attention is scored by bam or mlp, or not at all: none."),
    ] = "bam",
    gate: Annotated[
        bool,
        typer.Option(help="There is a gate, or the memory is the part that carries over alone."),
    ] = True,
    question_weight: Annotated[
        float | None,
        typer.Option(
            help="What the attention of questions counts, against that of repeating the text. "
            "Texts of a folder have no questions.",
            show_default="120",
        ),
    ] = None,
    seed: Seed = 0,
    dtype: DType = "float32",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Fit gate, scorer and head offsets to a model. Ctrl-C stops it, the same command goes on."""
    set_threads(threads)
    from .._files import lock_folder
    from ..fitting import QUESTION_WEIGHT, Checkpoint, FitConfig, fit

    if text is not None and question_weight is not None:
        raise ValueError("--question-weight needs no --text")
    weight = QUESTION_WEIGHT if question_weight is None else question_weight
    console = make_console()
    loaded, tokenizer, name = load_model(model, dtype, device)
    texts = _texts(tokenizer, text, length, count, seed, weight)
    config = FitConfig()
    config = replace(
        config,
        namm=config.namm.replace(scorer=scorer),
        gate=gate,
        attention=replace(config.attention, seed=seed),
    )
    with lock_folder(output), _progress(console) as on_step:
        checkpoint = Checkpoint(output / STATE_FILE, loaded, texts)
        found = fit(loaded, texts, config, checkpoint=checkpoint, on_step=on_step)
    found.policy.save_pretrained(output)
    checkpoint.remove()
    if found.gate_alone is not None:
        found.gate_alone.save_pretrained(output / GATE_ALONE)
    report = {
        "model": name,
        "dtype": dtype,
        "texts": {
            "folder": text and str(text),
            "length": length,
            "count": count,
            "seed": seed,
            "question_weight": None if text else weight,
        },
        "config": config.to_dict(),
        **found.report(),
    }
    (output / "fit.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if found.gate is not None:
        console.print(
            f"On {found.gate.num_held_out} texts held out, the gate explains {found.gate.r2:.0%} "
            f"of the variance of log importance, {found.gate.r2_within:.0%} within a head, and "
            f"finds {found.gate.recall:.0%} of the most important quarter."
        )
    also = "" if found.gate_alone is None else f", without its scorer in {GATE_ALONE}"
    console.print(f"Saved in [bold]{output}[/]{also}, figures in fit.json.")


def calibrate(
    model: ModelArgument,
    output: Folder,
    policy: Policy = None,
    text: Own = None,
    length: Length = 1024,
    count: Annotated[int, typer.Option(help="So many texts are read.", min=1)] = 4,
    seed: Seed = 0,
    dtype: DType = "float32",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Calibrate a memory for a model: statistics, and the offsets of its heads. A minute."""
    set_threads(threads)
    from ..fitting import QUESTION_WEIGHT, calibrate, calibrate_statistics

    console = make_console()
    loaded, tokenizer, _ = load_model(model, dtype, device)
    memory, name = load_policy(policy)
    texts = _texts(tokenizer, text, length, count, seed, QUESTION_WEIGHT)
    if memory.budget.size is None:
        memory = memory.with_budget(size=0.25)
    memory = memory.with_budget(
        scope="global", layer_shares=None, threshold=None, sink_tokens=4, recent_tokens=32
    )
    with _progress(console) as on_step:
        if memory.needs_window:
            memory = calibrate_statistics(
                memory, loaded, texts, on_text=lambda n: on_step("statistics", n / count)
            )
        memory = calibrate(memory, loaded, texts, on_text=lambda n: on_step("offsets", n / count))
    memory.save_pretrained(output)
    console.print(f"{name} is calibrated for {model}, saved in [bold]{output}[/].")


def _texts(
    tokenizer: Any, folder: Path | None, length: int, count: int, seed: int, weight: float
) -> list[Text]:
    from ..fitting import folder_texts, training_texts

    if folder is not None:
        return folder_texts(tokenizer, folder, length=length, count=count, seed=seed)
    return training_texts(tokenizer, length=length, count=count, seed=seed, question_weight=weight)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading", total=1.0)

        def on_step(what: str, share: float) -> None:
            progress.update(task, description=what, completed=share)

        yield on_step
