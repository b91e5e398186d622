"""``namm compare``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..policy import NAMM
from ..tasks import IN_USE, RecordMix
from .shared import Json, Keep, Model, Threads, load_model, load_policy, make_console, set_threads


def compare(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="This memory is compared. The option may be repeated.",
            show_default="the bundled one",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="This baseline is compared. The option may be repeated.", show_default="all"
        ),
    ] = None,
    model: Model = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="A context has so many tokens. The option may be repeated."),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="This task family is asked for. The option may be repeated.", show_default="all"
        ),
    ] = None,
    examples: Annotated[int, typer.Option(help="A family has so many contexts.", min=1)] = 6,
    records: Annotated[
        int, typer.Option(help="So many records are asked for in a context.", min=1)
    ] = IN_USE.num_records,
    mentions: Annotated[
        int, typer.Option(help="So many lines state each of these records.", min=1)
    ] = IN_USE.mentions,
    idle: Annotated[
        int, typer.Option(help="So many records per 1,024 tokens are never asked for.", min=0)
    ] = IN_USE.idle_per_1024,
    windows: Annotated[
        int, typer.Option(help="So many windows of source code are read.", min=1)
    ] = 8,
    split: Annotated[
        str, typer.Option(help="The documents are those of test or of validation.")
    ] = "test",
    keep: Keep = 0.25,
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
            "--tune", help="The baselines are tuned on validation data, and only that is printed."
        ),
    ] = False,
    json_file: Json = None,
    threads: Threads = None,
) -> None:
    """Compare memories and baselines on tasks and source code, in one table."""
    set_threads(threads)
    loaded, tokenizer, model_name = load_model(model)
    from .. import compare as side_by_side
    from ..demo import DemoConfig, machine, run_comparison
    from ..tables import comparison_table, legend

    mix = RecordMix(records, mentions, idle)
    console = make_console()
    memories = [load_policy(name) for name in policy] if policy else [load_policy(None)]
    if layer_share:
        shares = tuple(layer_share)
        memories = [(m.with_budget(layer_shares=shares), name) for m, name in memories]
    if tune:
        _tune(
            loaded,
            tokenizer,
            memories[0][0],
            keep,
            (length or [1024])[0],
            examples,
            mix,
            console,
        )
        return
    names = ["NAMM"] if len(memories) == 1 else [Path(name).name[-12:] for _, name in memories]
    if len(set(names)) < len(names):
        names = [f"NAMM {i + 1}" for i in range(len(memories))]
    methods = [
        side_by_side.full_method(),
        *(side_by_side.Method(n, m) for (m, _), n in zip(memories, names, strict=True)),
        *(
            side_by_side.Method(name, side_by_side.tuned_baseline(name, memories[0][0]))
            for name in (side_by_side.TUNED if baseline is None else baseline)
        ),
    ]
    workloads = [
        side_by_side.Workload.make(
            tokenizer,
            split,
            length=tokens,
            families=family or side_by_side.FAMILIES,
            examples_per_family=examples,
            mix=mix,
            num_windows=windows,
        )
        for tokens in length or [1024]
    ]
    config = DemoConfig(keep_fraction=keep, repeats=repeats)
    rows: list[side_by_side.Row] = []
    try:
        run_comparison(loaded, methods, workloads, config, console, rows)
    finally:
        if any(row.exact_match for row in rows):
            console.print(comparison_table(rows, keep, console.width))
            console.print()
            console.print(legend(memories[0][0].config.n_up, mix))
    if json_file is not None:
        values = {
            "namm_ext": __version__,
            "model": model_name,
            "policies": dict(zip(names, (name for _, name in memories), strict=True)),
            "settings": {
                "split": split,
                "keep_fraction": keep,
                "examples_per_family": examples,
                "mix": asdict(mix),
                "num_windows": windows,
            },
            "rows": [row.to_dict() for row in rows],
            "machine": machine(),
        }
        json_file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _tune(
    model: Any,
    tokenizer: Any,
    memory: NAMM,
    keep: float,
    length: int,
    examples: int,
    mix: RecordMix,
    console: Console,
) -> None:
    from ..compare import Workload, tune_baselines
    from ..tasks import EVOLUTION_FAMILIES

    workload = Workload.make(
        tokenizer,
        "validation",
        length=length,
        families=EVOLUTION_FAMILIES,
        examples_per_family=examples,
        mix=mix,
        num_windows=1,
    )
    found = tune_baselines(
        model,
        workload.examples,
        n_up=memory.n_up,
        keep_fraction=keep,
        layer_shares=memory.budget.layer_shares,
        on_trial=lambda rule, value: console.print(
            f"{value:6.1%}  {rule}", style="dim", highlight=False
        ),
    )
    for rule in found.values():
        console.print(rule, highlight=False)
