"""Checkpoints of the original, SakanaAI/evo-memory."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import reference
from .base import checked


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What a NAMM needs from a checkpoint of the original."""

    params: Tensor
    mean: Tensor
    var: Tensor
    count: int


_STORED = "stored_buffers_to_save.token_embedding_0_output_"


def read_original_checkpoint(path: str | Path, which: str = "mean") -> OriginalCheckpoint:
    """Parameters of any size and statistics from a checkpoint of the original (spec 9.5).

    The file is mapped: of its 210 MB, three n x n matrices are read for their checksums alone.

    Args:
        path: the ``.pt`` file.
        which: "mean" or "best".

    Returns:
        ``params [n]``, ``mean [17]``, ``var [17]`` float32 and the count. Statistics never
        collected (count 0) come back as mean 0 and var 1 with a warning, which is what the
        original does with them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, would execute code, or lacks a key.
    """
    keys = {"mean": "mean", "best": "best_member"}
    if which not in keys:
        raise ValueError(f"read_original_checkpoint: which must be 'mean' or 'best', got {which!r}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_original_checkpoint: no such file: {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_members(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged files make torch.load raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: must be a torch checkpoint that loads without executing code, got {reason}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("evolution_state"), dict):
        raise ValueError(
            f"{path}: must hold an 'evolution_state' dict; not an evo-memory checkpoint"
        )
    state = {
        str(key).removeprefix("_orig_mod."): value
        for key, value in content["evolution_state"].items()
    }
    wanted = [keys[which], f"{_STORED}mean", f"{_STORED}var", f"{_STORED}num"]
    for key in wanted:
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: evolution_state must hold the tensor {key!r}, got none")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{path}: {key} must be a dense tensor, got {_kind(value)}")
    params = checked(keys[which], state[keys[which]], None, str(path)).flatten()
    count = _count(state[f"{_STORED}num"], str(path))
    bins = (reference.NUM_BINS,)
    if count == 0:
        warnings.warn(
            f"{path}: no normalisation statistics were collected; features pass unchanged",
            stacklevel=2,
        )
        return OriginalCheckpoint(params, torch.zeros(bins), torch.ones(bins), 0)
    mean, var = (checked(key, state[key].flatten(), bins, str(path)) for key in wanted[1:3])
    return OriginalCheckpoint(params, mean, var, count)


def _check_members(path: Path) -> None:
    """torch.load looks at no checksum, so other numbers would be loaded in silence."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"a wrong checksum of {damaged}")


def _kind(value: Tensor) -> str:
    if value.is_meta:
        return "one without data"
    return f"{value.layout}" if value.layout != torch.strided else f"{value.dtype}"


def _count(value: Tensor, source: str) -> int:
    """The largest of the counts, which stand in a tensor of integers or of floats."""
    name = f"{_STORED}num"
    if value.is_complex() or value.dtype == torch.bool or not value.numel():
        got = f"{value.numel()} of {value.dtype}"
        raise ValueError(f"{source}: {name} must hold whole numbers, got {got}")
    counts = value.double()
    if not bool(((counts >= 0) & (counts < 2**53) & (counts == counts.floor())).all()):
        raise ValueError(
            f"{source}: {name} must hold whole numbers of at least 0, got "
            f"{counts.min().item():g} to {counts.max().item():g}"
        )
    return int(counts.max())
