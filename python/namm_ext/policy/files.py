"""Saved policies: a folder with ``config.json`` and ``namm.safetensors``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_file
from ..budget import Budget
from ..config import NAMMConfig
from . import version1
from .calibration import Calibration
from .gate import Gate

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "namm.safetensors"
FORMAT = "namm_ext.NAMM"
#: 1 had the budget in its config, 1 and 2 had no checksum.
FORMAT_VERSION = 3
BUNDLED_PREFIX = "bundled:"


@dataclass(frozen=True)
class StoredPolicy:
    """What a folder holds: the arguments of ``NAMM``, and the file its tensors come from."""

    arguments: dict[str, Any]
    source: str


def write_policy(
    directory: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the two files into ``directory``, which is made if it is missing.

    Each is replaced as a whole, and a checksum over both says that they belong together.
    """
    safetensors_torch = _safetensors()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **settings}
    content["checksum"] = _checksum(content, tensors)
    text = json.dumps(content, indent=2) + "\n"
    write_file(folder / WEIGHTS_FILE, lambda file: file.write(safetensors_torch.save(tensors)))
    write_file(folder / CONFIG_FILE, lambda file: file.write(text.encode()))


def read_policy(name: str, revision: str | None = None) -> StoredPolicy:
    """What :func:`write_policy` wrote, in this version or an earlier one.

    Args:
        name: a folder, ``"bundled:<name>"`` or a Hugging Face Hub id.
        revision: of the Hub repository.

    Raises:
        FileNotFoundError: if there is no such policy or one of its two files is missing.
        ValueError: if a file is damaged or not a NAMM; names the file and the field.
    """
    folder = _find_policy(name, revision)
    content = _read_content(folder / CONFIG_FILE)
    config, budget, gate = _settings(folder / CONFIG_FILE, content)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"NAMM: {path} is missing")
    safetensors_torch = _safetensors()
    from safetensors import SafetensorError

    try:
        tensors = safetensors_torch.load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: must be a safetensors file, got {error}") from error
    if content["format_version"] == FORMAT_VERSION and content.get("checksum") != _checksum(
        content, tensors
    ):
        raise ValueError(
            f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are damaged or do not belong together, "
            "their checksum is another; save the policy again"
        )
    parts: dict[str, dict[str, Tensor]] = {"calibration": {}, "gate": {}}
    for key in sorted(tensors):
        part, _, name = key.partition(".")
        if name and part in parts:
            parts[part][name] = tensors.pop(key)
    expected = {"params", "mean", "var", "count"}
    if set(tensors) != expected:
        raise ValueError(
            f"{path}: tensors must be {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(tensors)) or 'none'}"
        )
    if tensors["count"].numel() != 1:
        raise ValueError(f"{path}: count must be one number, got {list(tensors['count'].shape)}")
    arguments = {
        **tensors,
        "count": int(tensors["count"]),
        "config": config,
        "budget": budget,
        "made_for": content.get("made_for"),
    }
    try:
        if parts["calibration"]:
            arguments["calibration"] = Calibration.from_tensors(parts["calibration"])
        if parts["gate"] or gate is not None:
            arguments["gate"] = Gate.from_parts(gate or {}, parts["gate"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return StoredPolicy(arguments, str(path))


def bundled_policies() -> list[str]:
    """Names of the policies that come with the package."""
    root = Path(str(resources.files("namm_ext") / "zoo" / "policies"))
    return sorted(p.parent.name for p in root.glob(f"*/{CONFIG_FILE}"))


def _find_policy(name: str, revision: str | None) -> Path:
    if name.startswith(BUNDLED_PREFIX):
        short = name.removeprefix(BUNDLED_PREFIX)
        if short not in bundled_policies():
            raise FileNotFoundError(
                f"NAMM: bundled policy must be one of {', '.join(bundled_policies()) or '(none)'}, "
                f"got {short!r}"
            )
        return Path(str(resources.files("namm_ext") / "zoo" / "policies" / short))
    folder = Path(name)
    if folder.is_dir():
        return folder
    # A Hub id is "name" or "owner/name"; anything else can only be a path.
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or folder.exists():
        raise FileNotFoundError(f"NAMM: name_or_path must be a folder, got {name!r}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"NAMM: {name!r} is not a folder, and reading it from the Hugging Face Hub needs "
            "huggingface_hub: pip install 'namm_ext[hf]'"
        ) from error
    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
        )
    )


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything in both files, whatever its order."""
    settings = {name: value for name, value in content.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"NAMM: {path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT!r}; this is not a saved NAMM")
    version = content.get("format_version")
    if version not in (1, 2, FORMAT_VERSION):
        raise ValueError(f"{path}: format_version must be 1 to {FORMAT_VERSION}, got {version!r}")
    if not isinstance(content.get("made_for", {}), dict):
        raise ValueError(f"{path}: made_for must be a section, got {content['made_for']!r}")
    for section in ("config",) if version == 1 else ("config", "budget"):
        if not isinstance(content.get(section), dict):
            raise ValueError(f"{path}: section {section!r} is missing; save the policy again")
    return content


def _settings(
    path: Path, content: Mapping[str, Any]
) -> tuple[NAMMConfig, Budget, dict[str, Any] | None]:
    version, config = content["format_version"], content["config"]
    try:
        if version == 1:
            return (*version1.split_config(config), None)
        budget = Budget.from_dict(content["budget"])
        return NAMMConfig.from_dict(config), budget, content.get("gate")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing policies needs safetensors: pip install 'namm_ext[hf]'"
        ) from error
    return safetensors.torch
