"""The command line ``namm``."""

from __future__ import annotations

import typer

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
for command in (demo, compare, fit, calibrate, evolve, train_lm, info):
    app.command(command.__name__.replace("_", "-"))(command)
