"""Saved memories: one safetensors file with the live tokens of every layer.

The file names the policy and the model that filled it. A memory of another policy would be judged
by a rule that its state was not made for, and keys of another model mean nothing: both are errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..ragged import from_tensors, to_tensors
from .layer import NAMMLayer
from .session import Session

FORMAT = "namm_ext.NAMMCache"
FORMAT_VERSION = "1"


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the names, shapes and first numbers of all parameters: cheap, and another
    checkpoint or dtype changes it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        first = parameter.detach().reshape(-1)[:16].double().cpu()
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def save(session: Session, layers: Sequence[Any], path: str | Path) -> None:
    """See ``NAMMCache.save``."""
    import safetensors.torch

    model = None if session.model is None else session.model()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "save: the cache must be made with NAMMCache(model, policy), got one made from a "
            "configuration, which cannot say what model its keys belong to"
        )
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            if layer.keys is not None and layer.values is not None:
                tensors[f"{i}.keys"], tensors[f"{i}.values"] = layer.keys, layer.values
                tensors[f"{i}.length"] = torch.tensor(layer.cumulative_length)
        elif isinstance(layer, NAMMLayer) and layer.kv is not None:
            tensors |= {f"{i}.{name}": t for name, t in to_tensors(layer.kv).items()}
            tensors[f"{i}.padded"] = torch.tensor(layer.padded)
    if session.past_mask is not None:
        tensors["past_mask"] = session.past_mask
    if session.param_index is not None:
        tensors["param_index"] = session.param_index
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "policy": session.policy.fingerprint(),
        "model": model_fingerprint(model),
        "num_layers": str(len(layers)),
    }
    # Equal tensors that share memory would be refused, and slices would carry their storage.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, str(path), {"namm": json.dumps(metadata)})


def fill(
    session: Session,
    layers: Sequence[Any],
    model: PreTrainedModel,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | Path,
) -> None:
    """Put what ``read`` found in the file ``path`` into a new cache. See ``NAMMCache.load``."""
    earlier = session.policy.earlier_fingerprints()
    for what, expected, also in (
        ("policy", session.policy.fingerprint(), earlier),
        ("model", model_fingerprint(model), ()),
        ("num_layers", str(len(layers)), ()),
    ):
        if metadata.get(what) not in (expected, *also):
            raise ValueError(
                f"{path}: {what} must be {expected}, got {metadata.get(what)}; the cache was "
                f"filled with another {'model' if what == 'num_layers' else what}"
            )
    device = model.device
    past_mask = tensors.get("past_mask")
    session.past_mask = None if past_mask is None else past_mask.to(device)
    try:
        for i, layer in enumerate(layers):
            own = {
                name.removeprefix(f"{i}."): t
                for name, t in tensors.items()
                if name.startswith(f"{i}.")
            }
            if not own:
                continue
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.lazy_initialization(own["keys"].to(device), own["values"].to(device))
                layer.keys, layer.values = own["keys"].to(device), own["values"].to(device)
                layer.cumulative_length = int(own["length"])
                continue
            layer.kv = from_tensors(
                own,
                session.policy_on(device),
                device=device,
                layer_idx=i,
                param_index=session.param_index,
                ledger=session.ledger,
            )
            layer.padded = session.padded = int(own["padded"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: the saved cache is damaged: {error}") from error


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or foreign.
    """
    import safetensors
    import safetensors.torch

    if not path.is_file():
        raise FileNotFoundError(f"NAMMCache.load: no such file: {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("namm", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, Any] = json.loads(text)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: must be a safetensors file, got {error}") from error
    if (metadata.get("format"), metadata.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path}: must be a cache saved by NAMMCache.save, version 1")
    return metadata, tensors
