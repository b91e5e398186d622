"""The bundled Decision Transformer acts as its figures say, and needs what it remembers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from namm_ext import baselines, zoo
from namm_ext.integrations.control import one_hot, roll_out
from namm_ext.tasks.corridor import Corridor, CorridorConfig
from namm_ext.zoo import train_control as recipe
from pages import run_page

ROOT = Path(__file__).parents[1]
FOLDER = Path(zoo.__file__).parent / "controllers" / zoo.DEFAULT_CONTROLLER


def metrics() -> dict:
    return json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


def test_bundled_files() -> None:
    assert zoo.bundled_controllers() == [zoo.DEFAULT_CONTROLLER]
    names = {"config.json", "metrics.json", "model.safetensors", "training.jsonl"}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2**20
    stock = transformers.AutoModel.from_pretrained(FOLDER)
    assert type(stock) is transformers.DecisionTransformerModel
    training = metrics()["training"]
    assert sum(p.numel() for p in stock.parameters()) == training["parameters"]
    last = json.loads((FOLDER / "training.jsonl").read_text().splitlines()[-1])
    assert last["step"] == sum(stage["steps"] for stage in training["stages"])
    with pytest.raises(ValueError, match="name must be one of corridor, or a folder"):
        zoo.load_controller("maze")


def test_it_acts_and_needs_its_memory() -> None:
    model, corridor = zoo.load_controller(), Corridor(range(6), "test")
    earned = []
    for policy in (None, baselines.StreamingLLM(75)):
        found = roll_out(
            model, policy, corridor, [1.0] * 6,
            max_steps=recipe.CORRIDOR.steps, reward_scale=recipe.CORRIDOR.doors, choose=one_hot,
        )  # fmt: skip
        earned.append(found.returns.mean().item() / recipe.CORRIDOR.doors)
    assert earned[0] == pytest.approx(metrics()["full_cache"]["return"], abs=0.03)
    assert earned[1] < earned[0] - 0.2


def test_quick_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "evaluate", lambda model, seeds: {"return": 0.0})
    entries: list[dict] = []
    folders = [
        recipe.train_control(tmp_path / name, quick=True, seed=seed, on_log=entries.append)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert [entry["step"] for entry in entries] == [2, 2, 2]
    states = [zoo.load_controller(folder).state_dict() for folder in folders]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not all(torch.equal(states[2][name], value) for name, value in states[0].items())
    facts = json.loads((folders[2] / "metrics.json").read_text())["training"]
    assert facts["seed"] == 2


def test_an_untrained_model_earns_little() -> None:
    found = recipe.evaluate(recipe.new_model(recipe.ControlConfig()).eval(), range(2))
    assert found["return"] < 0.3
    assert found["random"] < 0.1


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("control")


def test_comparison_runs(bench, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "c.json"
    names = ["NAMM of SmolLM2", "H2O, per head"]
    command = ["control.py", "--episodes", "2", "--seeds", "2", "--keep", "0.25", "--noise", "0.2"]
    methods = [part for name in names for part in ("--method", name)]
    monkeypatch.setattr(sys, "argv", [*command, *methods, "--json", str(path)])
    small = CorridorConfig(steps=64, sign_cells=24, used=6)
    for name, value in (("CORRIDOR", small), ("TOKENS", 192), ("CALIBRATION", 2), ("TEXT", 128)):
        monkeypatch.setattr(bench, name, value)
    assert bench.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["full cache", *names]
    assert rows[0]["of_full"] == [100.0, 100.0, 100.0]
    assert [row["kept"] for row in rows] == [1.0, *[pytest.approx(0.25, abs=0.02)] * 2]
    assert all(len(row["returns"]) == 4 for row in rows)
    dropped = rows[2]["dropped"]
    mean = (dropped["return"] + dropped["state"] + dropped["action"]) / 3
    assert mean == pytest.approx(1 - (48 + 63) / 191, abs=0.01)  # those since the update are held
    assert set(rows[2]["other - best actions"]) != {0.0}
    monkeypatch.setattr(sys, "argv", ["control.py", "--markdown", str(path)])
    capsys.readouterr()
    bench.main()
    table = capsys.readouterr().out.splitlines()
    assert table[3] == "| return | 25 % kept |"
    assert table[5].startswith("| full cache | ")
    with pytest.raises(ValueError, match="--method must be one of NAMM, a gate fitted here; "):
        bench.policies(zoo.load_controller(), 64, ["PyramidKV"])


def test_tables_are_the_measured_ones(bench) -> None:
    page = (ROOT / "docs/control.md").read_text(encoding="utf-8")
    content = json.loads((ROOT / "bench/results/control.json").read_text(encoding="utf-8"))
    model = zoo.DEFAULT_CONTROLLER
    for table in (bench.markdown(content, 0.0, model), bench.forgotten(content, 0.2, 0.25, model)):
        assert len(table.splitlines()) > 10
        assert table in page


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_page("docs/control.md")
    assert "of the full cache" in capsys.readouterr().out
