"""Small models of language, videos and control that come with the package or are found beside it.

Example:
    >>> from namm_ext import zoo
    >>> model, tokenizer = zoo.load_model(), zoo.load_tokenizer()
    >>> sum(p.numel() for p in model.parameters())
    1049728
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from .converted import PACKAGED_MODELS, converted_folder, packaged_gguf

DEFAULT_MODEL = "stdlib-1m"
DEFAULT_CONTROLLER = "corridor"
VIDEO_MODEL = "clips"
"""Watches the videos of :mod:`namm_ext.zoo.clips`."""

__all__ = [
    "DEFAULT_CONTROLLER",
    "DEFAULT_MODEL",
    "PACKAGED_MODELS",
    "VIDEO_MODEL",
    "bundled_controllers",
    "bundled_models",
    "is_hub_id",
    "load_controller",
    "load_model",
    "load_tokenizer",
    "load_video_model",
    "model_path",
    "packaged_gguf",
]


def bundled_models() -> list[str]:
    """Names of the language models that come with the package."""
    names = {path.parent.name for path in _models_folder().glob("*/config.json")}
    return sorted(names - {VIDEO_MODEL})


def model_path(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a model; any tool that reads Hugging Face folders can use it.

    Args:
        name: one of :func:`bundled_models` or `VIDEO_MODEL`; one of `PACKAGED_MODELS`, whose file
            another package carries; a GGUF file; or a folder with a ``config.json``. GGUF files
            are converted on first use and kept in the user's cache folder.

    Raises:
        ImportError: if the package that carries the model, or reads it, is not installed.
        FileNotFoundError: if there is no such GGUF file.
        ValueError: if ``name`` is none of these.
    """
    if name in (*bundled_models(), VIDEO_MODEL):
        return _models_folder() / name
    if name in PACKAGED_MODELS:
        return converted_folder(packaged_gguf(name))
    path = Path(name)
    if path.suffix == ".gguf":
        return converted_folder(path)
    if (path / "config.json").is_file():
        return path
    names = ", ".join([*bundled_models(), VIDEO_MODEL, *PACKAGED_MODELS])
    raise ValueError(
        f"name must be one of {names}, a GGUF file or a folder with a config.json, got {name!r}"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is ``OWNER/NAME`` of the Hugging Face Hub, and no folder or file.

    Example:
        >>> is_hub_id("HuggingFaceTB/SmolLM2-360M-Instruct"), is_hub_id("runs/a/b")
        (True, False)
    """
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.endswith(".gguf")
    return named and not Path(name).exists()


def _source(name: str) -> Path | str:
    return name if is_hub_id(name) else model_path(name)


def load_model(name: str = DEFAULT_MODEL, **kwargs: Any) -> Any:
    """A language model, on the CPU and in float32, ready to generate.

    Args:
        name: as in :func:`model_path`, or ``OWNER/NAME`` of the Hugging Face Hub.
        **kwargs: for ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: if the files lack weights of the model.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, kwargs)


def load_video_model(name: str = VIDEO_MODEL, **kwargs: Any) -> Any:
    """A model that watches videos, on the CPU and in float32, ready to generate.

    Args:
        name: `VIDEO_MODEL`, a folder, or ``OWNER/NAME`` of the Hugging Face Hub.
        **kwargs: for ``AutoModelForImageTextToText.from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: if the files lack weights of the model (`VIDEO_MODEL` before transformers 5.14).
    """
    from transformers import AutoModelForImageTextToText

    return _load(AutoModelForImageTextToText, name, kwargs)


def _load(kind: Any, name: str, kwargs: dict[str, Any]) -> Any:
    """With all its weights: transformers would go on with random ones."""
    import torch
    import transformers

    given = {"dtype": torch.float32, **kwargs, "output_loading_info": True}
    model, info = kind.from_pretrained(_source(name), **given)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name}: all weights must be there, got none for {len(missing)} such as "
            f"{missing[0]!r}; other versions of transformers than {transformers.__version__} may "
            "call them otherwise"
        )
    return model.eval()


def load_tokenizer(name: str = DEFAULT_MODEL) -> Any:
    """The tokenizer of a language model; ``name`` as in :func:`load_model`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_source(name))


def bundled_controllers() -> list[str]:
    """Names of the Decision Transformers that come with the package."""
    return sorted(path.parent.name for path in _controllers_folder().glob("*/config.json"))


def load_controller(name: str | Path = DEFAULT_CONTROLLER) -> Any:
    """A Decision Transformer, on the CPU and in float32, ready to act.

    Args:
        name: one of :func:`bundled_controllers`, or a folder with a ``config.json``.

    Raises:
        ValueError: if there is no such model.
    """
    from transformers import DecisionTransformerModel

    bundled = bundled_controllers()
    folder = _controllers_folder() / name if name in bundled else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"name must be one of {', '.join(bundled)}, or a folder with a config.json, got "
            f"{str(name)!r}"
        )
    return DecisionTransformerModel.from_pretrained(folder).eval()


def _models_folder() -> Path:
    return Path(str(resources.files(__package__))) / "models"


def _controllers_folder() -> Path:
    return Path(str(resources.files(__package__))) / "controllers"
