"""Where the golden vectors are, how to read them and compare with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


def golden_dir() -> Path:
    """Folder of the golden vectors: NAMM_GOLDEN_DIR, or the one next to this file."""
    return Path(os.environ.get("NAMM_GOLDEN_DIR") or Path(__file__).parent / "golden")


def golden_files(pattern: str, without: str | None = None) -> list:
    """Files of the folder as parameters; ``without`` leaves out npz files with such a key."""
    paths = sorted(golden_dir().glob(pattern))
    if without is not None:
        paths = [path for path in paths if not any(without in key for key in np.load(path).files)]
    return [pytest.param(path, id=path.stem) for path in paths]


def load(path: Path) -> dict[str, Tensor | str]:
    """All arrays as tensors; uint16 bits of bfloat16 as bfloat16; strings as str."""
    arrays: dict[str, Tensor | str] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            array = file[key]
            if array.dtype.kind == "U":
                arrays[key] = str(array)
            elif key.endswith("__bf16bits"):
                bits = torch.from_numpy(array.view(np.int16).copy())
                arrays[key.removesuffix("__bf16bits")] = bits.view(torch.bfloat16)
            else:
                arrays[key] = torch.from_numpy(np.array(array))
    return arrays


def assert_near(got: Tensor, want: Tensor, atol: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, want {list(want.shape)}"
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= atol, f"{what}: error {error:.3e} > {atol:.0e}"
