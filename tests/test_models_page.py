"""docs/models.md says what tools/models_table.py finds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
FEW = (
    *("llama", "qwen3_5_text", "gpt_oss", "gemma2", "gemma4_text", "deepseek_v3"),
    *("falcon_h1", "olmo3"),
)
NAMES = re.findall(r"^\| (\S+) \|", PAGE, flags=re.MULTILINE)[1:]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    made_for = re.search(r"transformers (\S+),", PAGE)
    assert made_for
    if made_for[1] != transformers.__version__:
        pytest.skip(f"the page was made for transformers {made_for[1]}")
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "tools/models_table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["models_table"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in FEW)]
)
def test_the_page_says_what_is_found(tool: ModuleType, name: str) -> None:
    _, (line,) = tool.table([name])
    assert line in PAGE


def test_the_page_counts() -> None:
    counted = [int(n) for n in re.findall(r"(\d+) (?:served|refused|others)\b", PAGE)]
    assert sum(counted) == len(NAMES)
    assert counted[0] == PAGE.count("**served**")
    assert "differs" not in PAGE
