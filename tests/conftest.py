"""Shared pytest set-up: versions in the header, the same seeds for every test."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy as np
import pytest
import torch
from golden_files import golden_dir


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def pytest_report_header(config: pytest.Config) -> list[str]:
    versions = [f"{name} {_version(name)}" for name in ("namm_ext", "transformers", "cma")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        f"torch {torch.__version__}, numpy {np.__version__}, {', '.join(versions)}",
        f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        f"golden vectors: {golden_dir()}",
    ]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
