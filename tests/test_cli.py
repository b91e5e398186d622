"""``namm``: the commands run for real on small settings, and say what is wrong with their input."""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("cma")

import typer
from namm_ext import (
    NAMM,
    Budget,
    NAMMConfig,
    cli,
    compare,
    corpus,
    demo,
    tables,
    tasks,
    zoo,
)
from namm_ext.baselines import StreamingLLM
from namm_ext.cli.app import app
from typer.testing import CliRunner

TINY = demo.DemoConfig(
    lengths=(256,),
    examples_per_family=(1,),
    num_windows=(1,),
    mix=tasks.RecordMix(2, mentions=2, idle_per_1024=4),
    new_tokens=4,
    repeats=1,
    evolve_seconds=0.0,
    evolve_length=128,
    popsize=2,
    num_examples=1,
    num_validation=2,
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
    assert set(group.commands) == {"demo", "compare", "evolve", "train-lm", "info"}
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
    expected = f"namm: --model must be a folder, a GGUF file or one of {names}, got 'nowhere'"
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
    "keep, 1 - compression ratio) or None, got 1.5"
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--baseline", "Magic"],
            "baseline must be one of StreamingLLM, H2O, SnapKV, TOVA, KNorm, KeyDiff, Random, "
            "got 'Magic'",
        ),
        (["--split", "train"], "split must be 'test' or 'validation', got 'train'"),
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


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy_dir: Path) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    file, output = tmp_path / "demo.json", tmp_path / "evolved"
    arguments = ["--json", str(file), "--policy", str(policy_dir), "--output", str(output)]
    result = CliRunner().invoke(app, ["demo", "--quick", *arguments])
    assert result.exit_code == 0, result.output

    values = json.loads(file.read_text())
    rows = {row["method"]: row for row in values["rows"]}
    assert list(rows) == [compare.FULL, "NAMM", *compare.TUNED]
    for name, row in rows.items():
        assert set(row["exact_match"]) == set(compare.FAMILIES), name
        assert 0 < row["bits_per_byte"] < 8, name
        assert name in result.output
    full = rows.pop(compare.FULL)
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
    assert set(evolution["levels"]) == {compare.FULL, *compare.TUNED}
    assert NAMM.from_pretrained(output / "policy").budget.size == 32
    assert str(output / "policy") in result.output.replace("\n", "")
    assert values["interrupted"] is False


def test_demo_stops_with_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy_dir: Path
) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    measure = compare.measure_text

    def interrupt(model: object, policy: object, workload: object, row: compare.Row) -> None:
        if row.method == "NAMM":
            raise KeyboardInterrupt
        measure(model, policy, workload, row)

    monkeypatch.setattr(compare, "measure_text", interrupt)
    file = tmp_path / "demo.json"
    arguments = ["--json", str(file), "--policy", str(policy_dir), "--output", str(tmp_path / "x")]
    result = CliRunner().invoke(app, ["demo", "--quick", *arguments])
    assert result.exit_code == 130
    assert "Stopped" in result.output
    values = json.loads(file.read_text())
    assert values["interrupted"] is True
    full, namm = values["rows"]
    assert full["bits_per_byte"]
    assert namm["exact_match"]
    assert namm["bits_per_byte"] is None
    assert not (tmp_path / "x").exists()


def test_compare(tmp_path: Path, policy_dir: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--policy", str(policy_dir), "--policy", str(policy_dir), "--baseline", "KeyDiff"]
    sizes = ["--length", "192", "--length", "256", "--examples", "1", "--windows", "1"]
    rest = ["--family", "assign", "--repeats", "0", "--keep", "0.5", "--json", str(file)]
    rest += ["--records", "2", "--mentions", "2", "--idle", "4"]
    for share in ("1.25", "0.75", "0.5", "1.5"):
        rest += ["--layer-share", share]
    result = CliRunner().invoke(app, ["compare", *arguments, *sizes, *rest])
    assert result.exit_code == 0, result.output
    assert "2 records per context, each stated 2 times, among 4 per 1,024" in result.output
    values = json.loads(file.read_text())
    mix = {"num_records": 2, "mentions": 2, "idle_per_1024": 4}
    assert values["settings"]["mix"] == mix
    for row in values["rows"]:
        if row["method"] != compare.FULL:
            assert row["settings"]["budget"]["layer_shares"] == [1.25, 0.75, 0.5, 1.5]
    names = [compare.FULL, "NAMM 1", "NAMM 2", "KeyDiff"]
    assert [(row["length"], row["method"]) for row in values["rows"]] == [
        (length, name) for length in (192, 256) for name in names
    ]
    assert all(row["cost"] is None for row in values["rows"])
    assert [row["kept"] for row in values["rows"]] == [1, 0.5, 0.5, 0.5] * 2


# Parts -----------------------------------------------------------------------------------------


def test_tuned_rules_are_among_the_tried_ones() -> None:
    for name, policy in compare.TUNED.items():
        tried = [repr(p) for p in compare.candidates(type(policy), 0.25)]
        assert repr(policy) in tried, name
        assert len(set(tried)) == len(tried)
        divided = compare.candidates(type(policy), 0.25, (0.5, 1.5))
        assert {p.budget.layer_shares for p in divided} == {None, (0.5, 1.5)}
    assert [rule.__name__ for rule in compare.TRIED] == list(compare.TUNED)


def test_rules_follow_the_memory() -> None:
    memory = NAMM(NAMMConfig(n_up=16), budget=Budget(9, layer_shares=(0.5, 1.5)))
    rule = compare.tuned_baseline("SnapKV", memory)
    assert (rule.n_up, rule.window, rule.budget.layer_shares) == (16, 16, (0.5, 1.5))
    assert compare.for_context(rule, 0.25, 1023).budget.size == 255
    assert compare.for_context(rule, 1, 1023).budget.size == 1023


def test_tuning_takes_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TRIED", {StreamingLLM: {"sink_tokens": (1, 4, 16)}})
    values = {1: (0.2, -1.0), 4: (0.4, -1.0), 16: (0.4, -0.5)}

    class Result:
        def __init__(self, match: float, logprob: float) -> None:
            self.exact_match, self.answer_ll = torch.tensor([match]), torch.tensor([logprob])

    def evaluate(model: Any, policy: StreamingLLM, examples: Any) -> Result:
        assert policy.budget.size == 192
        return Result(*values[policy.budget.sink_tokens])

    monkeypatch.setattr(compare, "evaluate_policy", evaluate)
    workload = compare.Workload.make(
        zoo.load_tokenizer(), "validation", length=768, examples_per_family=1
    )
    found = compare.tune_baselines(zoo.load_model(), workload.examples)
    assert repr(found) == "{'StreamingLLM': " + repr(compare.TUNED["StreamingLLM"]) + "}"


def test_workload_is_fixed_and_held_out() -> None:
    tokenizer = zoo.load_tokenizer()
    mix = tasks.RecordMix(2, idle_per_1024=8)
    sizes = {"length": 256, "examples_per_family": 1, "mix": mix, "num_windows": 2}
    test = compare.Workload.make(tokenizer, "test", **sizes)
    again = compare.Workload.make(tokenizer, "test", **sizes)
    validation = compare.Workload.make(tokenizer, "validation", **sizes)
    assert test.examples == again.examples
    assert torch.equal(test.windows, again.windows)
    assert not {e.input_ids for e in test.examples} & {e.input_ids for e in validation.examples}
    assert test.windows.shape == (2, 256)
    source = tokenizer.decode(test.windows[0, 1:].tolist())
    held_out = "\n\n".join(corpus.load_documents("test"))
    assert source[200:300] in held_out


def make_rows() -> list[compare.Row]:
    rows = []
    for name, match, bits in ((compare.FULL, 1.0, 1.0), ("NAMM", 0.75, 1.2), ("TOVA", 0.5, 1.1)):
        cost = compare.Cost(1024, 0.25, 31, 17, 90, 100, 0.012, 0.0015, 64)
        matches = dict.fromkeys(compare.FAMILIES, match)
        rows.append(compare.Row(name, {}, 1024, matches, {}, bits, 0.25, cost))
    return rows


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_and_marks_the_best(width: int) -> None:
    from rich.console import Console

    console = Console(
        width=width, record=True, force_terminal=True, color_system="standard", file=StringIO()
    )
    console.print(tables.comparison_table(make_rows(), 0.25, width))
    plain = console.export_text(clear=False)
    assert "…" not in plain
    assert "75.0 1.200 25.0  31  17  48   12  1.5" in plain
    styled = re.sub("m +", "m", console.export_text(styles=True))
    marked = [line for line in styled.splitlines() if "1;32m" in line]
    assert len(marked) == 2
    assert "1;32m75.0" in marked[0]
    assert "1;32m1.200" not in marked[0]
    assert "1;32m1.100" in marked[1]
    assert "1;32m50.0" not in marked[1]


def test_verdict() -> None:
    assert tables.verdict(make_rows()).plain == (
        "1,024 tokens: NAMM answers 75% of what the full cache answers, the best baseline (TOVA) "
        "50%; its keys and values take 31% of the bytes."
    )


def test_chart() -> None:
    text = tables.chart([(0, 0.0), (5, 0.5), (10, 1.0)], {"TOVA": 0.5, "full cache": 1.0}, 11, 5)
    lines = text.plain.splitlines()
    assert [line.index("●") - 8 for line in lines if "●" in line] == [10, 5, 0]
    assert lines[0].endswith("full cache 100%")
    assert lines[2].endswith("TOVA 50%")
    assert "╌" in lines[2]
    assert lines[-1].endswith("generation 10")
