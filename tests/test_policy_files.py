"""Saved policies: written, read, found, and refused where they are damaged."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from namm_ext import NAMM, Budget, policy
from small_context import NONFINITE, random_namm
from torch import Tensor

CHANGED = {
    **{"scorer": "mlp", "mlp_depth": 2, "feature_transform": "log"},
    "budget": Budget(77, scope="per_layer", recent_tokens=0.5),
}


def without_checksum(folder):
    """What config.json says, written as in version 2."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"format_version": 2}
    del content["checksum"]
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("bank", [False, True], ids=["vector", "bank"])
@pytest.mark.parametrize("changes", [{}, CHANGED], ids=["defaults", "changed"])
def test_save_and_load(tmp_path, changes, bank):
    namm = random_namm(**changes)
    if bank:
        namm = namm.with_params(torch.randn(3, namm.config.num_params))
    namm.save_pretrained(tmp_path / "policy")
    back = NAMM.from_pretrained(tmp_path / "policy")
    assert back.config == namm.config
    assert back.budget == namm.budget
    assert back.count == namm.count == 12
    for name in ("params", "mean", "var"):
        assert torch.equal(getattr(back, name), getattr(namm, name))
    assert back.fingerprint() == namm.fingerprint()
    assert sorted(os.listdir(tmp_path / "policy")) == ["config.json", "namm.safetensors"]


@pytest.fixture
def saved(tmp_path) -> Path:
    random_namm().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    path = str(folder / "namm.safetensors")
    content = {**load_file(path), **tensors}
    save_file({name: t for name, t in content.items() if t is not None}, path)


@pytest.mark.parametrize(("tensors", "message"), [
    ({"params": torch.zeros(100)}, r"params must be \[4172\] or \[P, 4172\], got \[100\]"),
    ({"params": NONFINITE}, "params must be finite, got 2 NaN or infinite values"),
    ({"params": torch.zeros(4172).int()}, "params must be a floating tensor, got torch.int32"),
    ({"mean": torch.full((17,), math.nan)}, "mean must be finite, got 17 NaN or infinite values"),
    ({"var": torch.ones(3)}, r"var must be \[17\], got \[3\]"),
    ({"var": None}, "tensors must be count, mean, params, var, got count, mean, params"),
    ({"extra": torch.ones(1)}, "tensors must be count, .*, got count, extra, mean, params, var"),
    ({"count": torch.ones(2)}, r"count must be one number, got \[2\]"),
], ids=range(8))  # fmt: skip
def test_bad_tensors_in_the_file(saved, tensors, message):
    rewrite(saved, **tensors)
    without_checksum(saved)
    with pytest.raises(ValueError, match=rf"namm\.safetensors: {message}"):
        NAMM.from_pretrained(saved)


def test_damaged_tensor_file(saved):
    path = saved / "namm.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"namm\.safetensors: must be a safetensors file, got "):
        NAMM.from_pretrained(saved)
    torch.save({"params": torch.zeros(4172)}, path)
    with pytest.raises(ValueError, match=r"namm\.safetensors: must be a safetensors file, got "):
        NAMM.from_pretrained(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"namm\.safetensors is missing"):
        NAMM.from_pretrained(saved)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda c: c["config"].update(colour=1), "NAMMConfig: keys must be among n_up, .*, got colour"),
    (lambda c: c["config"].update(n_up=3), "n_up must be a positive multiple of 16, got 3"),
    (lambda c: c.update(config=3), "config.json: section 'config' is missing"),
    (lambda c: c.update(format_version=4), "format_version must be 1 to 3, got 4"),
    (lambda c: c["budget"].update(size=0), "config.json: Budget: size must be an int of at least"),
    (lambda c: c.pop("format"), "format must be 'namm_ext.NAMM'; this is not a saved NAMM"),
    (lambda c: c["config"].update(scorer="mlp"), r"params must be \[25\] or .*, got \[4172\]"),
], ids=range(7))  # fmt: skip
def test_bad_config_file(saved, edit, message):
    path = saved / "config.json"
    content = without_checksum(saved)
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        NAMM.from_pretrained(saved)


def test_unreadable_config_file(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: must be JSON, got "):
        NAMM.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        NAMM.from_pretrained(saved)


def test_hub_id(saved, monkeypatch):
    calls = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append((name, revision, allow_patterns))
        return str(saved)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    namm = NAMM.from_pretrained("someone/some-namm", revision="v1")
    assert namm.fingerprint() == NAMM.from_pretrained(saved).fingerprint()
    assert calls == [("someone/some-namm", "v1", ["config.json", "namm.safetensors"])]

    # A local folder of that name wins, and a path never reaches the Hub.
    monkeypatch.chdir(saved.parent)
    assert NAMM.from_pretrained(saved.name).fingerprint() == namm.fingerprint()
    for path in ("./nothing", "/no/such/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="name_or_path must be a folder, got"):
            NAMM.from_pretrained(path)
    assert len(calls) == 1


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"'a/b' is not a folder, and .* huggingface_hub"):
        NAMM.from_pretrained("a/b")


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'namm_ext\[hf\]'"):
        random_namm().save_pretrained(tmp_path)


def test_bundled_policies(monkeypatch, tmp_path):
    assert "mine" not in policy.bundled_policies()
    namm = random_namm()
    namm.save_pretrained(tmp_path / "zoo" / "policies" / "mine")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    assert policy.bundled_policies() == ["mine"]
    assert NAMM.from_pretrained("bundled:mine").fingerprint() == namm.fingerprint()
    with pytest.raises(
        FileNotFoundError, match=r"bundled policy must be one of mine, got '\.\./x'"
    ):
        NAMM.from_pretrained("bundled:../x")


def test_every_bundled_policy_loads():
    for name in policy.bundled_policies():
        namm = NAMM.from_pretrained(f"bundled:{name}")
        assert namm.gate is not None or namm.params.any(), name
