"""``namm demo``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from .shared import (
    Device,
    DType,
    Json,
    Policy,
    Threads,
    load_model,
    load_policy,
    make_console,
    need,
    set_threads,
)

REAL_MODEL = "smollm2-135m"


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Less is read, and all is done in two minutes.")
    ] = False,
    json_file: Json = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The evolved memory is kept in this folder.", show_default="runs/demo-TIME"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The language model is a name of the zoo, a folder or a GGUF file.",
            show_default=f"{REAL_MODEL} if it is installed, else the bundled one",
        ),
    ] = None,
    policy: Policy = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="A head may keep this share of a context's tokens, on average.",
            show_default="0.25",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Contexts have so many tokens.", show_default="1024")
    ] = None,
    dtype: DType = "float32",
    device: Device = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="The evolution goes on for so many seconds.", show_default="30, quick 10"
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Let a model answer from a quarter of its cache, compare memories, and evolve a new one."""
    need("cma")
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"--keep must be between 0 and 1, got {keep}")
    if length is not None and length < 256:
        raise ValueError(f"--length must be at least 256, got {length}")
    set_threads(threads)
    console = make_console()
    loaded, tokenizer, model_name = _load(model, dtype, device, console)
    memory, policy_name = load_policy(policy, model_name)
    from ..demo import QUICK, DemoConfig, Subject, run_demo

    config = QUICK if quick else DemoConfig()
    if length is not None:
        config = replace(config, length=length)
    if keep is not None:
        config = replace(config, keep=keep, evolution=replace(config.evolution, keep=keep))
    if seconds is not None:
        config = replace(config, evolution=replace(config.evolution, seconds=seconds))
    if output is None:
        output = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    parameters = sum(p.numel() for p in loaded.parameters())
    console.print(
        f"[bold]namm_ext {__version__}[/]  model [bold]{model_name}[/] ({parameters / 1e6:.1f} M "
        f"parameters)  memory [bold]{policy_name}[/] ({memory.num_numbers} parameters)\n"
    )
    result = run_demo(
        Subject(loaded, tokenizer, model_name, memory, policy_name),
        config,
        console=console,
        output_dir=output,
        json_path=json_file,
    )
    if result["interrupted"]:
        raise typer.Exit(130)


def _load(
    name: str | None, dtype: str, device: str | None, console: Console
) -> tuple[Any, Any, str]:
    """The model that was asked for; otherwise the real one, or the bundled one in its place."""
    if name is not None:
        return load_model(name, dtype, device)
    try:
        return load_model(REAL_MODEL, dtype, device)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):  # of an extra: nothing would work
            raise
        console.print(
            f"[yellow]{REAL_MODEL} is not installed (make real-model does it), so the bundled "
            "model of 1 M parameters takes its place.[/]"
        )
    return load_model(None, dtype, device)
