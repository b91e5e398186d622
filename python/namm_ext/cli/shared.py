"""Options that several commands have, and what is behind them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..policy import NAMM

_MODELS = (
    "The language model is one of the zoo, a folder of transformers, a GGUF file or an id of the "
    "hub."
)
Model = Annotated[str | None, typer.Option(help=_MODELS, show_default="the bundled one")]
ModelArgument = Annotated[str, typer.Argument(help=_MODELS)]
Policy = Annotated[
    str | None,
    typer.Option(
        help="The memory is bundled:NAME, a folder or an id of the hub.",
        show_default="the bundled one",
    ),
]
DType = Annotated[
    str, typer.Option(help="The language model computes in float32, bfloat16 or float16.")
]
Device = Annotated[
    str | None,
    typer.Option(help="The language model is on this device, such as cuda.", show_default="cpu"),
]
Threads = Annotated[
    int | None,
    typer.Option(help="So many CPU threads are used.", show_default="torch's choice"),
]
Keep = Annotated[
    float, typer.Option(help="A head may keep this share of a context's tokens, on average.")
]
Json = Annotated[Path | None, typer.Option("--json", help="All figures are written to this file.")]
Output = Annotated[
    Path,
    typer.Argument(help="The run is kept in this folder. A run that is there already is resumed."),
]


def make_console() -> Console:
    """Of the terminal's width; of a table's where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def need(*modules: str) -> None:
    """Complain at once about what would be missing minutes later."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load_model(
    name: str | None, dtype: str = "float32", device: str | None = None
) -> tuple[Any, Any, str]:
    """Model, tokenizer and name; a folder wins over a name of the zoo."""
    need("transformers", "tokenizers", "safetensors")
    import transformers

    from .. import zoo

    transformers.utils.logging.disable_progress_bar()
    chosen = zoo.DEFAULT_MODEL if name is None else name
    if Path(chosen).is_dir():
        if not (Path(chosen) / "config.json").is_file():
            raise FileNotFoundError(f"--model: {chosen} holds no config.json")
        chosen = str(Path(chosen).absolute())
    elif not chosen.endswith(".gguf"):
        known = [*zoo.bundled_models(), *zoo.PACKAGED_MODELS]
        if chosen not in known and not zoo.is_hub_id(chosen):
            raise ValueError(
                f"--model must be a folder, a GGUF file, OWNER/NAME of the hub or one of "
                f"{', '.join(known)}, got {chosen!r}"
            )
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    model = zoo.load_model(chosen, dtype=getattr(torch, dtype))
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch without it, or no such device
            raise ValueError(f"--device: {device!r} cannot be used: {error}") from error
    return model, zoo.load_tokenizer(chosen), name or chosen


def load_policy(name: str | None, model: str = "") -> tuple[NAMM, str]:
    """A memory and its name; without one, the bundled memory of the model or the default one."""
    from .. import zoo
    from ..policy import NAMM, bundled_policies

    if name is None:
        own = model in bundled_policies()
        name = f"bundled:{model if own else zoo.DEFAULT_MODEL}"
        if not own and model:
            typer.echo(
                f"namm: no memory comes with {model}; bundled:{zoo.DEFAULT_MODEL}, which was "
                f"evolved on another model, takes its place. `namm fit {model} DIR` makes one.",
                err=True,
            )
            return NAMM.from_pretrained(name).with_made_for(None), name  # it is said
    return NAMM.from_pretrained(name), name


def set_threads(threads: int | None) -> None:
    """Of torch; None leaves its choice."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
