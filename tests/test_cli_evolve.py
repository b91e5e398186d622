"""``namm evolve``: on each kind of data, stopped and resumed, and what it refuses."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("cma")

from namm_ext import NAMM, Budget, Calibration, NAMMConfig, cli, evolution, tasks
from namm_ext.cli.app import app
from typer.testing import CliRunner

BAD_SIZE = (
    "Budget: size must be an int of at least 1 (tokens per head), a float in (0, 1] (the share to "
    "keep, 1 - compression ratio), bytes such as '2 GiB', or None, got 1.5"
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What ``namm`` ends with, given wrong input."""
    monkeypatch.setattr(sys, "argv", ["namm", *arguments])
    with pytest.raises(SystemExit) as error:
        cli.main()
    return str(error.value)


@pytest.mark.parametrize("in_use", [False, True])
def test_evolve_on_records_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_use: bool
) -> None:
    problems: list[evolution.RecordProblem] = []

    def stop(_: object, problem: evolution.RecordProblem, *__: object, **___: object) -> None:
        problems.append(problem)
        raise ValueError("seen enough")

    monkeypatch.setattr(evolution, "evolve", stop)
    arguments = ["evolve", str(tmp_path), "--length", "1024", *["--in-use"] * in_use]
    assert run(monkeypatch, *arguments) == "namm: seen enough"
    once = (tasks.STATED_ONCE,)
    assert problems[0].mixes == ((tasks.IN_USE, *once) if in_use else once)


SMALL = ("--popsize", "4", "--n-up", "16", "--no-imitate")


def evolve_twice(output: Path, *arguments: str) -> list[dict[str, float]]:
    """One generation, then one more; the log."""
    for generations in (1, 2):
        command = ["evolve", str(output), *SMALL, "--generations", str(generations), *arguments]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        assert [record["generation"] for record in log] == [1, 2][:generations]
    assert NAMM.from_pretrained(output / "policy").config.n_up == 16
    return log


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for i in range(4):
        text = "\n".join(f"{i} times {j} is {i * j}." for j in range(200))
        (folder / f"table-{i}.md").write_text(text)


def test_evolve_and_resume(tmp_path: Path) -> None:
    log = evolve_twice(tmp_path / "run", "--length", "128")
    assert "exact_match_best" in log[0]


def test_evolve_on_a_folder_of_text(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    log = evolve_twice(tmp_path / "run", "--text", str(tmp_path / "texts"), "--length", "128")
    assert log[0]["text_ll_mean"] == pytest.approx(log[0]["fitness_mean"])


def test_evolve_on_prompts_and_answers(tmp_path: Path) -> None:
    lines = [{"prompt": f"{i} + 1 = " * 20, "answer": f"{i + 1}"} for i in range(12)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = evolve_twice(tmp_path / "run", "--jsonl", str(path))
    assert 0 <= log[0]["exact_match_mean"] <= 1


def save_calibrated(folder: Path) -> Path:
    """A memory that is ready for the bundled model, all layers alike."""
    fractions = torch.tensor([0.25, 0.5, 1.0])
    start = NAMM(
        NAMMConfig(n_up=16, scorer="mlp"),
        torch.full((25,), 0.1),
        budget=Budget(0.25, scope="global"),
        calibration=Calibration(torch.zeros(4, 2), fractions, fractions.expand(4, -1)),
    )
    start.save_pretrained(folder)
    return folder


ONE = ("--popsize", "4", "--generations", "1", "--length", "512", "--examples", "1")


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(evolution.ReadingProblem, num_validation=1, tasks=("single",))
    monkeypatch.setattr(evolution, "ReadingProblem", few)


@pytest.mark.usefixtures("few_questions")
@pytest.mark.parametrize("part", ["scorer", "division"])
def test_a_memory_goes_on_on_questions(tmp_path: Path, chatting_model: Path, part: str) -> None:
    start = save_calibrated(tmp_path / "start")
    command = ["evolve", str(tmp_path / "run"), "--policy", str(start), *ONE]
    command += ["--model", str(chatting_model)]
    command += ["--division"] if part == "division" else []
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["problem"]["problem"] == "ReadingProblem"
    state = np.load(tmp_path / "run" / "state.npz")
    assert state["search_mean"].shape == ((12,) if part == "division" else (25,))
    assert not np.array_equal(state["search_mean"], state["x0"])
    log = json.loads(str(state["log"]))
    # The start itself was validated, and one generation is too early for another.
    assert [record["generation"] for record in log] == [0, 1]
    before, after = NAMM.from_pretrained(start), NAMM.from_pretrained(tmp_path / "run" / "policy")
    assert after.budget.size == 128
    assert after.with_budget(size=0.25).fingerprint() == before.fingerprint()


@pytest.mark.usefixtures("few_questions")
def test_a_run_of_another_memory_is_not_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chatting_model: Path
) -> None:
    start = save_calibrated(tmp_path / "start")
    command = ["evolve", str(tmp_path / "run"), "--policy", str(start), *ONE, "--division"]
    command += ["--model", str(chatting_model)]
    assert CliRunner().invoke(app, command).exit_code == 0
    NAMM.from_pretrained(start).with_params(torch.zeros(25)).save_pretrained(start)
    assert "start" in run(monkeypatch, *command)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--division"], "--division needs --policy"),
        (
            ["--policy", "a", "--division", "--text", "b"],
            "--division needs neither --text nor --jsonl",
        ),
        (
            ["--text-weight", "3"],
            "--text-weight needs --policy and a model that chats, and no data of your own",
        ),
        (["--policy", "a", "--n-up", "8"], "--n-up is for a fresh memory, --policy has its own"),
        (
            ["--policy", "bundled:stdlib-1m", "--division"],
            "--division needs a model that chats, stdlib-1m does not",
        ),
        (
            ["--policy", "bundled:smollm2-135m"],
            "--policy: the memory has no scorer to evolve; add --division",
        ),
        (["--text", "a", "--jsonl", "b"], "--text needs no --jsonl"),
        (["--chat-template"], "--chat-template needs --jsonl"),
        (["--jsonl", "b", "--length", "64"], "--length needs no --jsonl"),
        (["--text", "a", "--in-use"], "--in-use needs neither --text nor --jsonl"),
        (["--text", "nowhere"], "TextProblem: folder must be a folder, got 'nowhere'"),
        (["--jsonl", "nowhere"], "[Errno 2] No such file or directory: 'nowhere'"),
        (["--keep", "1.5"], BAD_SIZE),
    ],
)
def test_wrong_evolve_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    assert run(monkeypatch, "evolve", str(tmp_path / "run"), *arguments) == f"namm: {expected}"
    assert not (tmp_path / "run").exists()


def test_ctrl_c_stops_a_fit_and_nothing_is_lost(tmp_path: Path) -> None:
    """The fit itself would go on for minutes; it is stopped while it reads."""
    write_texts(tmp_path / "texts")
    output = tmp_path / "run"
    command = [sys.executable, "-c", "from namm_ext.cli import main; main()", "evolve", str(output)]
    command += ["--text", str(tmp_path / "texts"), "--length", "512"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            while process.poll() is None and not (output / "fit.npz").exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert "Stopped. The same command goes on from here." in said
    assert "Traceback" not in said
    assert {path.name for path in output.iterdir()} == {"config.json", "fit.npz", ".lock"}


def test_ctrl_c_between_generations_is_a_wish_and_then_an_order() -> None:
    from namm_ext.cli.evolve import _Stop
    from rich.console import Console

    stop = _Stop(Console(file=StringIO()))
    with pytest.raises(KeyboardInterrupt):
        stop.on_signal()
    assert not stop.between_generations()
    stop.on_signal()
    assert stop.between_generations()
    with pytest.raises(KeyboardInterrupt):
        stop.on_signal()
