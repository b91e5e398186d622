"""Entry point of ``namm``: the commands are in `commands`, here is what goes wrong around them."""

from __future__ import annotations

import sys

# Which extra brings a module that may be missing.
_EXTRAS = {
    "cma": "evolve",
    "rich": "evolve",
    "safetensors": "hf",
    "tokenizers": "hf",
    "transformers": "hf",
    "typer": "evolve",
}


def main() -> None:
    """Run ``namm``. Expected errors end it with one line and status 1, Ctrl-C with 130."""
    try:
        from .commands import app

        app()
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        extra = _EXTRAS.get(module)
        if extra is None:
            raise
        sys.exit(f"namm: this needs {module}: pip install 'namm_ext[{extra}]'")
    except (FileNotFoundError, ImportError, TypeError, ValueError) as error:
        sys.exit(f"namm: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
