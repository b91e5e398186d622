"""``namm evolve``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .shared import (
    Device,
    DType,
    Keep,
    Model,
    Output,
    Threads,
    load_model,
    load_policy,
    make_console,
    need,
    set_threads,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..evolution import Problem
    from ..policy import NAMM


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
    policy: Annotated[
        str | None,
        typer.Option(
            help="This memory goes on: bundled:NAME, a folder, or an id of the hub. On a model "
            "that chats it is evolved to answer questions about what it has read.",
            show_default="a fresh one",
        ),
    ] = None,
    division: Annotated[
        bool,
        typer.Option(
            "--division",
            help="With --policy, what is evolved is not the scorer but how the budget is divided "
            "among layers and heads.",
        ),
    ] = False,
    text_weight: Annotated[
        float | None,
        typer.Option(
            help="Where questions are asked, the log-likelihood per token of what is read counts "
            "so much beside that of an answer.",
            show_default="10",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(help="A generation reads so many contexts.", min=1)] = 8,
    model: Model = None,
    dtype: DType = "float32",
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
            show_default="256 512 1024; where questions are asked 1024",
        ),
    ] = None,
    n_up: Annotated[
        int | None,
        typer.Option(help="So many tokens lie between two updates.", show_default="64"),
    ] = None,
    keep: Keep = 0.25,
    scope: Annotated[
        str | None,
        typer.Option(
            help="The budget is per_head, or the heads of a layer share it: per_layer.",
            show_default="per_layer",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="The features are taken as they are (none) or as logarithms (log).",
            show_default="log",
        ),
    ] = None,
    imitate: Annotated[
        bool,
        typer.Option(
            help="The search starts from a fit, by gradient, to the attention that tokens will get."
        ),
    ] = True,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Evolve a memory for a model. Ctrl-C stops the run, and the same command resumes it."""
    need("cma")
    set_threads(threads)
    from ..evolution import EvolveConfig, ImitateConfig, evolve

    fresh = {"--n-up": n_up, "--scope": scope, "--features": features}
    _check(text, jsonl, length, chat_template, in_use)
    _check_start(policy, division, text, jsonl, fresh)
    console = make_console()
    with _stop_on_ctrl_c(console) as stop:
        loaded, tokenizer, model_name = load_model(model, dtype, device)
        chats = bool(tokenizer.chat_template)
        if division and not chats:
            raise ValueError(f"--division needs a model that chats, {model_name} does not")
        asks = policy is not None and chats and text is None and jsonl is None
        if not asks and text_weight is not None:
            raise ValueError(
                "--text-weight needs --policy and a model that chats, and no data of your own"
            )
        if asks:
            weight = 10.0 if text_weight is None else text_weight
            problem = _questions(tokenizer, tuple(length or (1024,)), examples, weight)
        else:
            lengths = tuple(length or (256, 512, 1024))
            problem = _problem(tokenizer, text, jsonl, lengths, chat_template, in_use, examples)
        config = EvolveConfig(
            generations=generations, popsize=popsize, sigma0=sigma, seed=seed,
            validate_every=5 if asks else 10,
        )  # fmt: skip
        start: dict[str, Any] = {}
        if policy is None:
            config = replace(
                config,
                namm=config.namm.replace(n_up=n_up or 64, feature_transform=features or "log"),
                budget=replace(config.budget, size=keep, scope=scope or "per_layer"),
                imitation=ImitateConfig() if imitate else None,
            )
        else:
            memory, _ = load_policy(policy)
            config = replace(config, namm=memory.config, budget=replace(memory.budget, size=keep))
            start = _start(memory, division, asks)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            show = _Shown(progress, problem.metric, generations)
            result = evolve(
                *(loaded, problem, config, output),
                **start,
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


def _check_start(
    policy: str | None,
    division: bool,
    text: Path | None,
    jsonl: Path | None,
    fresh: dict[str, Any],
) -> None:
    if policy is None:
        if division:
            raise ValueError("--division needs --policy")
        return
    if division and (text is not None or jsonl is not None):
        raise ValueError("--division needs neither --text nor --jsonl")
    given = [name for name, value in fresh.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} is for a fresh memory, --policy has its own")


def _start(memory: NAMM, division: bool, asks: bool) -> dict[str, Any]:
    """What `evolve` is to know of a memory that goes on."""
    from ..evolution import Population

    if division:
        calibration = memory.calibration
        if calibration is None or memory.budget.scope != "global":
            raise ValueError("--division needs a memory with a calibration and a global budget")

        def divided(moves: Tensor) -> NAMM:
            return memory.with_calibration(calibration.moved(moves))

        return {
            "x0": torch.zeros(calibration.num_moves),
            "policy_of": lambda x: Population.of(divided, x),
        }
    if memory.params.numel() == 0:
        raise ValueError("--policy: the memory has no scorer to evolve; add --division")
    if memory.params.dim() != 1:
        raise ValueError(
            f"--policy: the memory must be a single one, got {memory.num_candidates} candidates"
        )
    make = memory.with_params
    return {
        "x0": memory.params,
        "policy_of": (lambda x: Population.of(make, x)) if asks else make,
    }


def _questions(
    tokenizer: Any, lengths: tuple[int, ...], examples: int, text_weight: float
) -> Problem:
    from ..evolution import ReadingProblem

    return ReadingProblem(
        tokenizer,
        lengths=lengths,
        num_examples=examples,
        validation_lengths=(max(lengths),),
        text_weight=text_weight,
    )


def _problem(
    tokenizer: Any,
    text: Path | None,
    jsonl: Path | None,
    lengths: tuple[int, ...],
    chat_template: bool,
    in_use: bool,
    examples: int,
) -> Problem:
    from ..corpus import load_documents
    from ..evolution import JsonlProblem, RecordProblem, TextProblem
    from ..tasks import IN_USE, STATED_ONCE

    if jsonl is not None:
        return JsonlProblem(jsonl, tokenizer, chat_template=chat_template, num_examples=examples)
    longest = (max(lengths),)
    if text is not None:
        return TextProblem(
            text, tokenizer, lengths=lengths, validation_lengths=longest, num_examples=examples
        )
    return RecordProblem(
        tokenizer,
        load_documents("train"),
        load_documents("validation"),
        lengths=lengths,
        validation_lengths=longest,
        num_examples=examples,
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
