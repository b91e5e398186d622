"""``namm info``."""

from __future__ import annotations

import importlib.util

import torch
from rich.markup import escape
from rich.table import Table

from .. import __version__
from .shared import make_console


def info() -> None:
    """Show the version, the binaries, the instruction set, torch, CUDA and what is bundled."""
    from .._library import libraries
    from ..policy import bundled_policies
    from ..zoo import bundled_models

    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("namm_ext", __version__),
        ("binaries", str(libraries.folder)),
        ("build", ", ".join(f"{k} {v}" for k, v in libraries.build_info.items() if k != "version")),
        ("instruction sets", ", ".join(libraries.supported_isas)),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("CUDA kernels", libraries.cuda_status),
        ("models", ", ".join(bundled_models()) or "none"),
        ("policies", ", ".join(f"bundled:{name}" for name in bundled_policies()) or "none"),
        *(("extra missing", text) for text in _missing_extras()),
    ):
        table.add_row(f"[bold]{name}[/]", escape(value))
    make_console().print(table)


def _missing_extras() -> list[str]:
    wanted = {
        "hf": ("transformers", "safetensors"),
        "evolve": ("cma",),
    }
    return [
        f"{extra} ({', '.join(missing)}): pip install 'namm_ext[{extra}]'"
        for extra, modules in wanted.items()
        if (missing := [name for name in modules if importlib.util.find_spec(name) is None])
    ]
