"""``namm evolve``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .shared import Keep, Model, Output, Threads, load_model, make_console, need, set_threads

if TYPE_CHECKING:
    from ..evolution import Problem


def evolve(
    output: Output,
    text: Annotated[
        Path | None,
        typer.Option(
            help="The memory is evolved to keep the text of this folder's files likely.",
            show_default="hidden records",
        ),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help="The memory is evolved to keep the answers in this file likely. Each of its lines "
            'is {"prompt": ..., "answer": ...}.',
            show_default="hidden records",
        ),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="With --jsonl, the prompt is put into the tokenizer's chat template.",
        ),
    ] = False,
    in_use: Annotated[
        bool,
        typer.Option(
            "--in-use",
            help="With hidden records, half of the contexts have records in use among idle ones. "
            "The contexts need 1,024 tokens or more.",
        ),
    ] = False,
    model: Model = None,
    generations: Annotated[
        int, typer.Option(help="The run has so many generations in all.", min=1)
    ] = 100,
    popsize: Annotated[int, typer.Option(help="A generation has so many candidates.", min=4)] = 16,
    sigma: Annotated[float, typer.Option(help="The search starts with this step size.")] = 0.065,
    seed: Annotated[int, typer.Option(help="Search and batches depend on this seed.")] = 0,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="A context has so many tokens. The option may be repeated. With --jsonl, "
            "contexts are as long as they are.",
            show_default="256 512 1024",
        ),
    ] = None,
    n_up: Annotated[int, typer.Option(help="So many tokens lie between two updates.")] = 64,
    keep: Keep = 0.25,
    scope: Annotated[
        str,
        typer.Option(help="The budget is per_head, or the heads of a layer share it: per_layer."),
    ] = "per_layer",
    features: Annotated[
        str, typer.Option(help="The features are taken as they are (none) or as logarithms (log).")
    ] = "log",
    imitate: Annotated[
        bool,
        typer.Option(
            help="The search starts from a fit, by gradient, to the attention that tokens will get."
        ),
    ] = True,
    threads: Threads = None,
) -> None:
    """Evolve a memory for a model. Ctrl-C stops the run, and the same command resumes it."""
    need("cma")
    set_threads(threads)
    from ..evolution import EvolveConfig, ImitateConfig, evolve

    _check(text, jsonl, length, chat_template, in_use)
    console = make_console()
    with _stop_on_ctrl_c(console) as stop:
        loaded, tokenizer, _ = load_model(model)
        problem = _problem(
            tokenizer, text, jsonl, tuple(length or (256, 512, 1024)), chat_template, in_use
        )
        config = EvolveConfig(
            namm=EvolveConfig().namm.replace(n_up=n_up, feature_transform=features),
            budget=replace(EvolveConfig().budget, size=keep, scope=scope),
            generations=generations,
            popsize=popsize,
            sigma0=sigma,
            seed=seed,
            imitation=ImitateConfig() if imitate else None,
        )
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            show = _Shown(progress, problem.metric, generations)
            result = evolve(
                *(loaded, problem, config, output),
                on_imitation=show.imitation,
                on_generation=show.generation,
                should_stop=stop.between_generations,
            )
    console.print(
        f"Best on validation: generation {result.generation}, saved in [bold]{output / 'policy'}[/]"
    )
    if stop.wanted:
        console.print(_STOPPED)
        raise typer.Exit(130)


_STOPPED = "Stopped. The same command goes on from here."


def _check(
    text: Path | None,
    jsonl: Path | None,
    length: list[int] | None,
    chat_template: bool,
    in_use: bool,
) -> None:
    for name, given, fits, needed in (
        ("--text", text is not None, jsonl is None, "no --jsonl"),
        ("--chat-template", chat_template, jsonl is not None, "--jsonl"),
        ("--length", length is not None, jsonl is None, "no --jsonl"),
        ("--in-use", in_use, text is None and jsonl is None, "neither --text nor --jsonl"),
    ):
        if given and not fits:
            raise ValueError(f"{name} needs {needed}")


def _problem(
    tokenizer: Any,
    text: Path | None,
    jsonl: Path | None,
    lengths: tuple[int, ...],
    chat_template: bool,
    in_use: bool,
) -> Problem:
    from ..corpus import load_documents
    from ..evolution import JsonlProblem, RecordProblem, TextProblem
    from ..tasks import IN_USE, STATED_ONCE

    if jsonl is not None:
        return JsonlProblem(jsonl, tokenizer, chat_template=chat_template)
    longest = (max(lengths),)
    if text is not None:
        return TextProblem(text, tokenizer, lengths=lengths, validation_lengths=longest)
    return RecordProblem(
        tokenizer,
        load_documents("train"),
        load_documents("validation"),
        lengths=lengths,
        validation_lengths=longest,
        mixes=(IN_USE, STATED_ONCE) if in_use else (STATED_ONCE,),
    )


class _Shown:
    """The progress bar of a run."""

    def __init__(self, progress: Progress, metric: str, generations: int) -> None:
        self.progress, self.metric = progress, metric
        self.task = progress.add_task("", total=generations)
        self.validation = "none yet"

    def value(self, value: float) -> str:
        return f"{value:.0%}" if self.metric == "exact_match" else f"{value:.3f}"

    def generation(self, record: dict[str, Any]) -> None:
        if f"validation_{self.metric}" in record:
            self.validation = self.value(record[f"validation_{self.metric}"])
        mean, best = (self.value(record[f"{self.metric}_{which}"]) for which in ("mean", "best"))
        self.progress.update(
            self.task,
            completed=record["generation"],
            description=(
                f"{record['length']} tokens: {self.metric} {mean}, best {best}; "
                f"validation {self.validation}"
            ),
        )

    def imitation(self, record: dict[str, Any]) -> None:
        at = f"round {record['round']}, step {record['step']}"
        loss = f", loss {record['loss']:.3f}" if record["step"] else ": reading"
        self.progress.update(self.task, description=f"fitting a start: {at}{loss}")


class _Stop:
    """What Ctrl-C does: before the first generation it interrupts; then the first one is a wish,
    and the second one interrupts."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.wanted = self.in_generation = False

    def between_generations(self) -> bool:
        self.in_generation = True
        return self.wanted

    def on_signal(self, *_: Any) -> None:
        if self.wanted or not self.in_generation:
            raise KeyboardInterrupt
        self.wanted = True
        self.console.print("[yellow]Stopping after this generation. Ctrl-C again stops at once.[/]")


@contextmanager
def _stop_on_ctrl_c(console: Console) -> Iterator[_Stop]:
    stop = _Stop(console)
    before = signal.signal(signal.SIGINT, stop.on_signal)
    try:
        yield stop
    except KeyboardInterrupt:
        console.print(_STOPPED)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)
