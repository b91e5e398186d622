"""Saved memories: one safetensors file with the live tokens of every layer.

The file names the policy and the model that filled it. A memory of another policy would be judged
by a rule that its state was not made for, and keys of another model mean nothing: both are errors.
A checksum over everything that is read makes any damage an error too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..ragged import from_tensors, lasting, to_tensors
from .layer import NAMMLayer
from .session import Session

FORMAT = "namm_ext.NAMMCache"
#: 1 had no checksum.
FORMAT_VERSION = "2"


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
                # While recording there are more columns than the window.
                window = slice(max(layer.keys.shape[2] - layer.sliding_window + 1, 0), None)
                tensors[f"{i}.keys"] = layer.keys[:, :, window]
                tensors[f"{i}.values"] = layer.values[:, :, window]
                tensors[f"{i}.length"] = torch.tensor(layer.cumulative_length)
        elif isinstance(layer, NAMMLayer) and layer.kv is not None:
            tensors |= {f"{i}.{name}": t for name, t in to_tensors(layer.kv).items()}
            tensors[f"{i}.padded"] = torch.tensor(layer.padded)
    tensors |= session.recurrent.to_tensors()
    if session.past_mask is not None:
        tensors["past_mask"] = session.past_mask
        (seen,) = {x.kv.seen for x in layers if isinstance(x, NAMMLayer) and x.kv is not None}
        behind_ends = torch.tensor(seen) - session.past_mask.sum(dim=1).cpu()
        if bool(behind_ends.any()):
            tensors["behind_ends"] = behind_ends
    if session.param_index is not None:
        tensors["param_index"] = session.param_index
    # Equal tensors that share memory would be refused, and slices would carry their storage.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "policy": session.policy.fingerprint(),
        "model": model_fingerprint(model),
        "num_layers": str(len(layers)),
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    # An interrupted save leaves an older file as it is.
    temporary = Path(path).with_name(f".{Path(path).name}.new")
    safetensors.torch.save_file(tensors, str(temporary), {"namm": json.dumps(metadata)})
    os.replace(temporary, path)


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
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, f"it must be a safetensors file, got {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: must be a cache saved by NAMMCache.save, got another file or a damaged one"
        )
    version = metadata.get("format_version")
    if version not in ("1", FORMAT_VERSION):
        raise ValueError(
            f"{path}: format_version must be 1 or {FORMAT_VERSION}, got {version}; a newer "
            "namm_ext wrote it, or it is damaged"
        )
    if version != "1" and metadata.get("checksum") != _checksum(metadata, tensors):
        raise damaged(path, "the checksum does not fit the content")
    return metadata, tensors


def damaged(path: str | Path, what: str) -> ValueError:
    """The error for a file whose content cannot be right."""
    return ValueError(
        f"{path}: the saved cache is damaged: {what}; save it again, or let the model read the "
        "text again"
    )


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything that ``fill`` uses, whatever its order in the file."""
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lasting
def fill(
    session: Session,
    layers: Sequence[Any],
    model: PreTrainedModel,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
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
    try:
        _fill(session, layers, model.device, tensors)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise damaged(path, str(error)) from error


def _fill(
    session: Session, layers: Sequence[Any], device: torch.device, tensors: Mapping[str, Tensor]
) -> None:
    left = set(tensors) - {"past_mask", "behind_ends", "param_index"}
    lengths: set[int] = set()
    batches: set[int] = set()
    for i, layer in enumerate(layers):
        prefix = f"{i}."
        names = [name for name in left if name.startswith(prefix)]
        left.difference_update(names)
        own = {name.removeprefix(prefix): tensors[name] for name in names}
        if isinstance(layer, DynamicSlidingWindowLayer):
            lengths.add(_fill_sliding(layer, own, device) if own else 0)
            continue
        if i in session.recurrent.layers:
            states = {name: own.pop(name).to(device) for name in list(own) if "_states." in name}
            if states:
                batches.add(session.recurrent.fill(i, states))
        if own and isinstance(layer, NAMMLayer):
            layer.kv = from_tensors(
                own,
                session.policy_on(device),
                device=device,
                layer_idx=i,
                param_index=session.param_index,
                ledger=session.ledger,
                num_layers=session.num_memories,
            )
            layer.padded = int(own["padded"])
            layer.is_initialized = True
            lengths.add(layer.padded)
        elif isinstance(layer, NAMMLayer):
            lengths.add(0)
        else:
            left.update(f"{prefix}{name}" for name in own)
    if left:
        raise ValueError(f"unknown tensors {sorted(left)[:3]}")
    if len(lengths) != 1:
        raise ValueError(f"all layers must have seen the same columns, got {sorted(lengths)}")
    (length,) = lengths
    past_mask = tensors.get("past_mask")
    rows = _check_rows(session, layers, length, past_mask, tensors.get("behind_ends"))
    if session.recurrent.layers:
        if length:
            session.recurrent.check()
        if batches != ({rows} if length else set()):
            raise ValueError("all layers must have the same batch")
    session.length = session.target = length
    session.past_mask = None if past_mask is None else past_mask.to(device)


def _fill_sliding(
    layer: DynamicSlidingWindowLayer, own: Mapping[str, Tensor], device: torch.device
) -> int:
    keys, values, length = own["keys"], own["values"], int(own["length"])
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise ValueError("keys and values of a sliding layer must fit each other")
    if keys.shape[2] != min(length, layer.sliding_window - 1):
        raise ValueError(f"a sliding layer must have its window of {length} columns")
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError("keys and values of a sliding layer must be finite")
    layer.lazy_initialization(keys.to(device), values.to(device))
    # Copies: the file is mapped, and may be written anew.
    layer.keys, layer.values = keys.to(device, copy=True), values.to(device, copy=True)
    layer.cumulative_length = length
    return length


def _check_rows(
    session: Session,
    layers: Sequence[Any],
    length: int,
    past_mask: Tensor | None,
    behind_ends: Tensor | None,
) -> int:
    """Every layer against the mask and the batch, whose rows are counted."""
    seen: list[int] | None = None
    if past_mask is not None:
        if past_mask.dtype != torch.bool or past_mask.dim() != 2 or past_mask.shape[1] != length:
            raise ValueError(f"past_mask must be [batch, {length}] bool")
        # Tokens that became padding behind an update have been seen.
        gone = past_mask.new_zeros(past_mask.shape[0]) if behind_ends is None else behind_ends
        if gone.shape != past_mask.shape[:1] or bool((gone < 0).any()):
            raise ValueError("behind_ends must have one number for every row")
        seen = (past_mask.sum(dim=1) + gone).tolist()
    for layer in layers:
        if isinstance(layer, NAMMLayer) and layer.kv is not None:
            if list(layer.kv.seen) != (seen or [length] * layer.kv.batch_size):
                raise ValueError(f"layer {layer.layer_idx} must have seen what the others have")
            seen = list(layer.kv.seen)
    for sliding in session.sliding.values():
        if sliding.keys is not None and seen is not None and len(seen) != sliding.keys.shape[0]:
            raise ValueError("all layers must have the same batch")
    index = session.param_index
    if index is not None and seen is not None and index.shape != (len(seen),):
        raise ValueError("param_index must have one entry per row")
    return 0 if seen is None else len(seen)
