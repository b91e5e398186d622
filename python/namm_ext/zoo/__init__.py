"""Small models that come with the package, and the recipe that made them.

Example:
    >>> from namm_ext import zoo
    >>> model, tokenizer = zoo.load_model(), zoo.load_tokenizer()
    >>> sum(p.numel() for p in model.parameters())
    1049728
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from .corpus import SPLITS, load_documents

DEFAULT_MODEL = "stdlib-1m"

__all__ = [
    "DEFAULT_MODEL",
    "SPLITS",
    "bundled_models",
    "load_documents",
    "load_model",
    "load_tokenizer",
    "model_path",
]


def bundled_models() -> list[str]:
    """Names of the language models that come with the package."""
    return sorted(path.parent.name for path in _models_folder().glob("*/config.json"))


def model_path(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a bundled model; any tool that reads Hugging Face folders can use it.

    Raises:
        ValueError: if no bundled model is called ``name``.
    """
    if name not in bundled_models():
        raise ValueError(f"name must be one of {bundled_models()}, got {name!r}")
    return _models_folder() / name


def load_model(name: str = DEFAULT_MODEL, **kwargs: Any) -> Any:
    """A bundled language model, on the CPU and in float32, ready to generate.

    Args:
        name: one of :func:`bundled_models`.
        **kwargs: for ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_path(name), **{"dtype": torch.float32, **kwargs}
    ).eval()


def load_tokenizer(name: str = DEFAULT_MODEL) -> Any:
    """The tokenizer of a bundled language model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(name))


def _models_folder() -> Path:
    return Path(str(resources.files(__package__))) / "models"
