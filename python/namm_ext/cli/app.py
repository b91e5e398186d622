"""The command line ``namm``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .chat import chat
from .compare import compare
from .demo import demo
from .evolve import evolve
from .fit import calibrate, fit
from .info import info
from .train_lm import train_lm

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Evolved KV-cache memory (NAMM) for models of transformers.",
)
for command in (demo, chat, compare, fit, calibrate, evolve, train_lm, info):
    app.command(command.__name__.replace("_", "-"))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"namm_ext {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    del version
