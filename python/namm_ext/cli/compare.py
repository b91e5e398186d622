"""``namm compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..policy import NAMM
from ..tasks import IN_USE, RecordMix
from .shared import (
    Device,
    DType,
    Json,
    Model,
    Threads,
    load_model,
    load_policy,
    make_console,
    set_threads,
)

if TYPE_CHECKING:
    from ..measure import Method, Workload


def compare(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="This memory is compared: bundled:NAME, a folder, or an id of the hub. The option "
            "may be repeated.",
            show_default="the bundled one",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="This baseline is compared. The option may be repeated.", show_default="all"
        ),
    ] = None,
    model: Model = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Each context has so many tokens. The option may be repeated.",
            show_default="1024",
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="A head may keep this share of a context's tokens, on average. The option may be "
            "repeated.",
            show_default="0.25",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="This task is asked. The option may be repeated.", show_default="all"),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            help="Each task has at least so many questions. For models that chat.",
            show_default="24",
            min=1,
        ),
    ] = None,
    question_visible: Annotated[
        bool,
        typer.Option(
            "--question-visible",
            help="The memory reads the question with the context. For models that chat.",
        ),
    ] = False,
    examples: Annotated[
        int, typer.Option(help="Each task has so many contexts with hidden records.", min=1)
    ] = 6,
    records: Annotated[
        int, typer.Option(help="So many records are asked for.", min=1)
    ] = IN_USE.num_records,
    mentions: Annotated[
        int, typer.Option(help="So many lines state each of them.", min=1)
    ] = IN_USE.mentions,
    idle: Annotated[
        int, typer.Option(help="So many records per 1,024 tokens are never asked for.", min=0)
    ] = IN_USE.idle_per_1024,
    windows: Annotated[
        int | None,
        typer.Option(
            help="So many windows of each kind of text are read.",
            show_default="4, of source code alone 8",
            min=0,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="The documents are those of test or of validation.")
    ] = "test",
    layer_share: Annotated[
        list[float] | None,
        typer.Option(
            help="A layer gets this part of the budget, with mean 1. The option is given once "
            "per layer and holds for all memories.",
            show_default="the memory's",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Times are measured so often. With 0 they are left out.", min=0)
    ] = 3,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="The baselines are tuned on validation data, and only what is found is printed.",
        ),
    ] = False,
    json_file: Json = None,
    dtype: DType = "float32",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Compare memories and baselines on tasks and text. With --json, a stopped run goes on."""
    set_threads(threads)
    loaded, tokenizer, model_name = load_model(model, dtype, device)
    from .. import measure
    from ..measure import tables
    from ..measure.progress import progress

    chats = bool(tokenizer.chat_template)
    if not chats and (questions is not None or question_visible):
        raise ValueError(
            f"--questions and --question-visible need a model that chats, {model_name} does not"
        )
    mix = RecordMix(records, mentions, idle)
    console = make_console()
    memories = _memories(policy, model_name, layer_share)
    keeps = keep or [0.25]
    lengths = length or [1024]
    num_windows = windows if windows is not None else 4 if chats else 8

    def workload(split: str, tokens: int, num_windows: int) -> Workload:
        if chats:
            return measure.ReadingWorkload.make(
                tokenizer,
                split,
                length=tokens,
                **({"names": task} if task else {}),
                questions=24 if questions is None else questions,
                num_windows=num_windows,
                question_visible=question_visible,
            )
        return measure.RecordWorkload.make(
            tokenizer,
            split,
            length=tokens,
            **({"names": task} if task else {}),
            examples_per_task=examples,
            mix=mix,
            num_windows=num_windows,
        )

    if tune:
        first = next(iter(memories.values()))
        _tune(
            loaded,
            tokenizer,
            workload("validation", lengths[0], 0),
            first,
            keeps[0],
            method,
            console,
        )
        return
    methods = _methods(model_name, memories, method or _rules(chats))
    methods = measure.made_ready(methods, loaded, tokenizer, lengths[0])
    settings: dict[str, Any] = {
        "model": model_name,
        "dtype": dtype,
        "split": split,
        "tasks": task or "all",
        "num_windows": num_windows,
        "timing": asdict(measure.Timing(repeats=repeats)),
    }
    if chats:
        settings |= {"questions": questions or 24, "question_visible": question_visible}
    else:
        settings |= {"examples": examples, "mix": asdict(mix)}
    results = measure.Results(settings, json_file)
    workloads = [workload(split, tokens, num_windows) for tokens in lengths]
    steps = measure.plan(
        loaded, tokenizer, methods, workloads, keeps, results, measure.Timing(repeats=repeats)
    )
    try:
        with progress(console, len(steps)) as show:
            measure.compare(steps, results, show)
    finally:
        if any(row.tasks for row in results.rows):
            console.print(tables.answers_table(results))
            console.print(tables.costs_table(results))
            n_up = next(iter(memories.values())).n_up
            console.print(tables.legend(n_up, None if chats else mix, question_visible))
            console.print()
            console.print(tables.verdict(results))


def _memories(
    names: Sequence[str] | None, model: str, layer_share: list[float] | None
) -> dict[str, NAMM]:
    """Memories under the names that the table shows."""
    loaded = [load_policy(name, model) for name in names or (None,)]
    stems = [Path(name).name.removeprefix("bundled:") for _, name in loaded]
    # The others by what they are called beyond the first.
    shown = ["NAMM", *(f"NAMM {stem.removeprefix(stems[0]).lstrip('-')}" for stem in stems[1:])]
    if len(set(shown)) < len(shown) or any(name == "NAMM " for name in shown):
        shown = [f"NAMM {i + 1}" for i in range(len(shown))]
    memories = [memory for memory, _ in loaded]
    if layer_share:
        memories = [m.with_budget(layer_shares=tuple(layer_share)) for m in memories]
    return dict(zip(shown, memories, strict=True))


def _rules(chats: bool) -> list[str]:
    """All rules; where a context and its questions are one text, none that reads it twice."""
    from .. import measure

    return [name for name, rule in measure.RULES.items() if chats or not rule.two_passes]


def _methods(model: str, memories: dict[str, NAMM], rules: list[str]) -> list[Method]:
    from .. import measure

    first = next(iter(memories.values()))
    return [
        measure.full_method(),
        *(measure.Method(name, memory) for name, memory in memories.items()),
        *measure.baseline_methods(model, first, rules),
    ]


def _tune(
    model: Any,
    tokenizer: Any,
    workload: Workload,
    memory: NAMM,
    keep: float,
    rules: list[str] | None,
    console: Console,
) -> None:
    from .. import measure

    found = measure.tune(
        model,
        tokenizer,
        workload,
        rules=rules or _rules(bool(tokenizer.chat_template)),
        n_up=memory.n_up,
        keep=keep,
        on_trial=lambda rule, value: console.print(
            f"{value:6.1%}  {rule}", style="dim", highlight=False
        ),
    )
    content = {name: measure.rule_to_dict(rule) for name, rule in found.items()}
    console.print(json.dumps(content, indent=1), highlight=False)
