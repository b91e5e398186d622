"""Shared pytest set-up: versions in the header, the same seeds for every test."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

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
        f"{platform.machine()}, {THREADS} threads, {device}",
        f"golden vectors: {golden_dir()}",
    ]


THREADS = torch.get_num_threads()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Tiny models are twice as fast on one thread; the kernels are tested on all there are."""
    kernels = request.path.name.startswith(("test_ops", "test_ragged", "test_golden"))
    torch.set_num_threads(THREADS if kernels else 1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def chatting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template, which it was never trained on."""
    from namm_ext import zoo

    folder = tmp_path_factory.mktemp("chats")
    shutil.copytree(zoo.model_path(), folder, dirs_exist_ok=True)
    tokenizer = zoo.load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder
