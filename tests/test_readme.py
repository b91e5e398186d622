"""The README's Python runs as it stands there, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/batches.md"])
def test_python_blocks_run(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    from namm_ext.cache import cache_keyword

    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        if "model" in names:  # as the page says
            block = block.replace("cache=cache", f"{cache_keyword(names['model'])}=cache")
        exec(compile(block, page, "exec"), names)
    assert "of the full cache" in capsys.readouterr().out  # the report of the first block


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools/readme_table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/benchmark.md"])
def test_tables_are_the_measured_ones(page: str, tmp_path: Path) -> None:
    """Whoever measures again runs tools/readme_table.py."""
    tables, text = tool(), (ROOT / page).read_text(encoding="utf-8")
    names = [match[2] for match in tables.BLOCK.finditer(text)]
    assert names
    assert tables.filled(text, RESULTS) == text
    if not all((RESULTS / f"{name}.json").is_file() for name in names):
        assert "Not measured yet." in text
        return
    for name in set(names):
        content = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
        (tmp_path / f"{name}.json").write_text(content.replace('"NAMM"', '"other"'))
    assert tables.filled(text, tmp_path) != text


def test_a_table_groups_tasks(tmp_path: Path) -> None:
    def row(method: str, keep: float, share: float) -> dict[str, Any]:
        task = {"questions": 8, "exact_match": [share, share], "kept": [keep, keep]}
        return {
            "method": method, "length": 512, "keep": keep, "accuracy": share, "kept": keep,
            "tasks": {"single": task, "multi_key": task, "code": task},
            "bits_per_byte": {"prose": 1.0, "code": 2.0}, "bits_over_full": 1 - keep,
            "share_of_full": [share, share - 0.1, share + 0.1], "cost": None,
        }  # fmt: skip

    rows = [row("full cache", 1.0, 1.0), row("NAMM", 0.25, 0.5), row("TOVA", 0.5, 0.5)]
    assert tool().table({"rows": rows}, 512, 0.25).splitlines() == [
        "| 512 tokens, 25 % kept, 24 questions | needles | lists, code | mean | % of full (95 %) |"
        " bits/byte | kept | k+v | + own | prefill | decode |",
        "|---|" + "---:|" * 10,
        "| full cache | 100 | 100 | 100.0 | - | 1.500 | 100 % | - | - | - | - |",
        "| **NAMM** | 50 | 50 | **50.0** | **50 (40-60)** | +75.0 % | 25 % | - | - | - | - |",
    ]
    many = [rows[0], *(row(f"rule {i}", 0.25, i / 10) for i in range(6)), rows[1]]
    best = tool().table({"rows": many}, 512, 0.25, "best").splitlines()[2:]
    assert [line.split("|")[1].strip() for line in best] == [
        "full cache", "**NAMM**", "rule 5", "rule 4", "rule 3", "rule 2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"512 tokens and 0.125 kept must be measured"):
        tool().table({"rows": rows}, 512, 0.125)


def test_a_table_of_costs_is_against_the_full_cache() -> None:
    def row(method: str, keep: float, seconds: float) -> dict[str, Any]:
        cost = {
            "kv_fraction": keep, "total_fraction": keep, "prefill_seconds": seconds,
            "decode_seconds": seconds / 100,
        }  # fmt: skip
        return {"method": method, "length": 512, "keep": keep, "accuracy": 1.0, "cost": cost}

    rows = [row("full cache", 1.0, 2.0), row("NAMM", 0.25, 1.5)]
    content = {"settings": {"dtype": "float32"}, "rows": rows}
    assert tool().table(content, 512, 0.25, "costs").splitlines()[2:] == [
        "| full cache | 100 % | 100 % | 2,000 ms | - | 20.0 ms | - |",
        "| NAMM | 25 % | 25 % | 1,500 ms | 0.75 | 15.0 ms | 0.75 |",
    ]


@pytest.mark.parametrize("name", ["stated_once", "layer_shares"])
def test_figures_are_the_measured_ones(name: str) -> None:
    text = " ".join((ROOT / "docs/benchmark.md").read_text(encoding="utf-8").split())
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    accuracy = {(row["method"], row["length"]): 100 * row["accuracy"] for row in content["rows"]}
    for method in ("NAMM", "KeyDiff", "full cache"):
        short, long = (accuracy[method, length] for length in (1024, 2048))
        assert f"{method} {short:.1f} and {long:.1f}" in text


def test_commands_exist() -> None:
    pytest.importorskip("typer")
    from namm_ext.cli.app import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    used = set(re.findall(r"\bnamm ([a-z][a-z-]+)", README))
    assert used
    assert used <= known
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
