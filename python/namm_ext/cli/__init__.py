"""Entry point of ``namm``: one file per command, and here what goes wrong around them."""

from __future__ import annotations

import sys

# Which extra brings a module that may be missing.
_EXTRAS = {
    "cma": "evolve",
    "rich": "cli",
    "safetensors": "hf",
    "tokenizers": "hf",
    "transformers": "hf",
    "typer": "cli",
}


def main() -> None:
    """Run ``namm``. Expected errors end it with one line and status 1, Ctrl-C with 130."""
    try:
        from .app import app

        app()
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        extra = _EXTRAS.get(module)
        if extra is None:
            raise
        sys.exit(f"namm: this needs {module}: pip install 'namm_ext[{extra}]'")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"namm: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
