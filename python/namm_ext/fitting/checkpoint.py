"""The sums of a gate's fit under way, in a file: an interrupted fit goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import write_file
from ..cache.files import model_fingerprint
from .importance import Text
from .ridge import Ridge

#: Texts between two writes.
EVERY = 8


class Checkpoint:
    """A file with the sums of all layers.

    Args:
        path: of the file; it need not exist.
        model: that reads.
        texts: that it reads.

    Raises:
        ValueError: if the file is damaged, or is that of another model or other texts.
    """

    def __init__(self, path: Path, model: Any, texts: Sequence[Text]) -> None:
        self.path = path
        words = repr([(text.ids, text.later) for text in texts])
        self.key = model_fingerprint(model) + hashlib.sha256(words.encode()).hexdigest()

    def load(self) -> tuple[int, list[Ridge]]:
        """How many texts were read, and the sums; 0 and none without a file."""
        if not self.path.exists():
            return 0, []
        try:
            with np.load(self.path, allow_pickle=False) as file:
                state = {name: file[name] for name in file.files}
            key, done, count = str(state["key"]), int(state["done"]), int(state["count"])
            totals, products = state["totals"], state["products"]
            num_inputs = int(state["num_inputs"])
        except Exception as error:  # damaged zip files make numpy raise almost anything
            raise ValueError(
                f"fit: {self.path} must be the state of a fit, got a damaged one; remove it to "
                "begin again"
            ) from error
        if key != self.key:
            raise ValueError(
                f"fit: {self.path} is the state of a fit of another model or to other texts; "
                "remove it, or take another folder"
            )
        sums = []
        for total, product in zip(totals, products, strict=True):
            ridge = Ridge(num_inputs, total.shape[0] - num_inputs)
            ridge.count = count
            ridge.total, ridge.products = torch.from_numpy(total), torch.from_numpy(product)
            sums.append(ridge)
        return done, sums

    def save(self, done: int, sums: Sequence[Ridge]) -> None:
        """Write the sums of the first ``done`` texts; the file is whole at any moment."""
        if not sums:
            return
        state: dict[str, Any] = {
            "key": np.array(self.key),
            "done": np.array(done),
            "count": np.array(sums[0].count),
            "num_inputs": np.array(sums[0].num_inputs),
            "totals": torch.stack([ridge.total for ridge in sums]).numpy(),
            "products": torch.stack([ridge.products for ridge in sums]).numpy(),
        }
        write_file(self.path, lambda file: np.savez(file, **state))

    def remove(self) -> None:
        """Remove the file, if it is there."""
        self.path.unlink(missing_ok=True)
