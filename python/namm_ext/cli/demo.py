"""``namm demo``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .shared import (
    Json,
    Model,
    Policy,
    Threads,
    load_model,
    load_policy,
    make_console,
    need,
    set_threads,
)


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Less is read, and all is done in a minute.")
    ] = False,
    json_file: Json = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The evolved memory is kept in this folder.", show_default="runs/demo-TIME"
        ),
    ] = None,
    model: Model = None,
    policy: Policy = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="The evolution goes on for so many seconds.", show_default="60, quick 10"
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Read held-out tasks and source code with every memory, then evolve one before your eyes."""
    need("cma")
    set_threads(threads)
    loaded, tokenizer, model_name = load_model(model)
    memory, policy_name = load_policy(policy)
    from ..demo import QUICK, DemoConfig, run_demo

    config = QUICK if quick else DemoConfig()
    if seconds is not None:
        config = replace(config, evolve_seconds=seconds)
    if output is None:
        output = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    console = make_console()
    parameters = sum(p.numel() for p in loaded.parameters())
    console.print(
        f"[bold]namm_ext {__version__}[/]  model [bold]{model_name}[/] ({parameters / 1e6:.1f} M "
        f"parameters)  memory [bold]{policy_name}[/] ({memory.config.num_params} parameters)\n"
    )
    result = run_demo(
        loaded,
        tokenizer,
        memory,
        config,
        console=console,
        output_dir=output,
        json_path=json_file,
        names=(model_name, policy_name),
    )
    if result["interrupted"]:
        raise typer.Exit(130)
