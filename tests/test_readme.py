"""The README's Python runs as it stands there, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "of the full cache" in capsys.readouterr().out  # the report of the first block


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_tables_are_the_measured_ones() -> None:
    """Whoever measures again runs tools/readme_table.py."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools/readme_table.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    content = json.loads((ROOT / "bench/results/demo.json").read_text(encoding="utf-8"))
    assert README.count("<!-- demo ") == 2
    assert tool.filled(README, content) == README
    changed = json.loads(json.dumps(content).replace('"NAMM"', '"other"'))
    assert tool.filled(README, changed) != README


def results(name: str) -> dict[tuple[str, int], dict[str, Any]]:
    content = json.loads((ROOT / "bench/results" / name).read_text(encoding="utf-8"))
    return {(row["method"], row["length"]): row for row in content["rows"]}


def test_sentences_are_the_measured_ones() -> None:
    prose = " ".join(README.split())
    rows = results("demo.json")
    accuracy = {m: row["accuracy"] for (m, length), row in rows.items() if length == 1024}
    full, namm = accuracy.pop("full cache"), accuracy.pop("NAMM")
    next_best = max(accuracy.values())
    assert f"NAMM answers {100 * namm / full:.0f} % of what the full cache answers" in prose
    assert f"the next best rule {100 * next_best / full:.0f} %" in prose
    assert f"{sum(rows['NAMM', 1024]['queries'].values())} questions" in prose
    for name in ("stated_once.json", "layer_shares.json"):
        rows = results(name)
        for method in ("NAMM", "KeyDiff", "full cache"):
            short, long = (100 * rows[method, length]["accuracy"] for length in (1024, 2048))
            assert f"{method} {short:.1f} and {long:.1f}" in prose, name


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
