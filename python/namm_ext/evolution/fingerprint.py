"""Short hashes of what a run depends on, so that it is never continued on something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

# What a configuration says about how a model was loaded, not about what it computes.
_VOLATILE = ("_name_or_path", "attn_implementation", "dtype", "torch_dtype", "transformers_version")


def hash_values(values: Any) -> str:
    """Of anything that JSON can hold.

    Example:
        >>> hash_values({"a": 1}) == hash_values({"a": 2})
        False
    """
    return hash_texts([json.dumps(values, sort_keys=True, default=str)])


def hash_texts(texts: Iterable[str]) -> str:
    """Of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]


def hash_tokenizer(tokenizer: Any) -> str:
    """Of the vocabulary and the rules; not of padding and truncation, which callers set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    rules.pop("padding", None)
    rules.pop("truncation", None)
    template = getattr(tokenizer, "chat_template", None)
    return hash_values([sorted(tokenizer.get_vocab().items()), rules, template])


def hash_model(model: Any) -> str:
    """Of the configuration and of every bit of the weights: about a second per gigabyte."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
