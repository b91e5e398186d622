"""Checkpoints of the original: read without executing code, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from namm_ext import NAMM, Budget, NAMMConfig
from small_context import NONFINITE

STORED = "stored_buffers_to_save.token_embedding_0_output_"


def checkpoint(path: Path, n: int = 4172, **changes) -> Path:
    state = {
        "mean": torch.randn(n),
        "best_member": torch.randn(n),
        f"{STORED}mean": torch.rand(1, 1, 1, 17),
        f"{STORED}var": torch.rand(1, 1, 1, 17),
        f"{STORED}num": torch.full((1, 1, 1, 17), 9),
        **changes,
    }
    state = {key: value for key, value in state.items() if value is not None}
    torch.save({"evolution_state": state, "iter_num": 1, "best_val_loss": 0.1}, path)
    return path


def test_checkpoint_of_another_size_is_refused(tmp_path):
    path = checkpoint(tmp_path / "x.pt", n=12)
    with pytest.raises(ValueError, match=r"x\.pt: params must be \[4172\] .*, got \[12\]"):
        NAMM.load_original_checkpoint(path)


def test_checkpoint_with_another_config(tmp_path):
    path = checkpoint(tmp_path / "x.pt", n=25)
    config = NAMMConfig(scorer="mlp", n_up=64)
    namm = NAMM.load_original_checkpoint(path, config=config, budget=9)
    assert namm.budget == Budget(9)
    assert namm.config.scorer == "mlp"
    assert namm.params.shape == (25,)


def test_checkpoint_of_the_old_file_format(tmp_path):
    path = checkpoint(tmp_path / "x.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    namm = NAMM.load_original_checkpoint(path, "best")
    assert torch.equal(namm.params, content["evolution_state"]["best_member"])


def test_checkpoint_without_statistics(tmp_path):
    path = checkpoint(tmp_path / "x.pt", **{f"{STORED}num": torch.zeros(1, 1, 1, 17).long()})
    with pytest.warns(UserWarning, match="no normalisation statistics were collected"):
        namm = NAMM.load_original_checkpoint(path)
    assert namm.mean.abs().max() == 0
    assert namm.var.min() == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"mean": None}, "evolution_state must hold the tensor 'mean', got none"),
    ({f"{STORED}var": None}, f"must hold the tensor '{STORED}var', got none"),
    ({"mean": NONFINITE}, "mean must be finite, got 2 NaN or infinite values"),
    ({f"{STORED}mean": torch.zeros(16)}, r"mean must be \[17\], got \[16\]"),
    ({"mean": torch.randn(4172, dtype=torch.complex64)}, "mean must be a floating tensor, got"),
    ({"mean": torch.randn(4172).to_sparse()}, "mean must be a dense tensor, got torch.sparse_coo"),
    ({"mean": torch.randn(4172).int()}, r"mean must be a floating tensor, got torch\.int32"),
    ({"mean": torch.empty(4172, device="meta")}, "mean must be a dense tensor, got one without"),
    ({f"{STORED}var": torch.full((17,), -0.5)}, "var must not be negative"),
    ({f"{STORED}num": torch.full((17,), torch.inf)}, "whole numbers of at least 0, got inf to inf"),
    ({f"{STORED}num": torch.full((17,), torch.nan)}, "whole numbers of at least 0, got nan to nan"),
    ({f"{STORED}num": torch.full((17,), 8.5)}, "whole numbers of at least 0, got 8.5 to 8.5"),
    ({f"{STORED}num": torch.full((17,), -1)}, "whole numbers of at least 0, got -1 to -1"),
    ({f"{STORED}num": torch.ones(17).cfloat()}, "whole numbers, got 17 of torch.complex64"),
    ({f"{STORED}num": torch.ones(0)}, "whole numbers, got 0 of torch.float32"),
    ({f"{STORED}num": torch.ones(17).to_sparse()}, "num must be a dense tensor"),
], ids=range(16))  # fmt: skip
def test_incomplete_checkpoint(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        NAMM.load_original_checkpoint(checkpoint(tmp_path / "x.pt", **changes))


def test_counts_may_be_floats(tmp_path):
    path = checkpoint(tmp_path / "x.pt", **{f"{STORED}num": torch.full((17,), 9.0)})
    assert NAMM.load_original_checkpoint(path).count == 9


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_and_damaged_checkpoints(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="no such file"):
        NAMM.load_original_checkpoint(path)
    refused = r"x\.pt: must be a torch checkpoint that loads without executing code, got "
    torch.save({"evolution_state": Payload(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    whole = checkpoint(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    for foreign in ({"model": {}}, [1, 2], {"evolution_state": torch.zeros(3)}):
        torch.save(foreign, path)
        with pytest.raises(ValueError, match="must hold an 'evolution_state' dict"):
            NAMM.load_original_checkpoint(path)
    with pytest.raises(ValueError, match="which must be 'mean' or 'best', got 'median'"):
        NAMM.load_original_checkpoint(path, "median")
