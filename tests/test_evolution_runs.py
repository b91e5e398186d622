"""Runs of an evolution: what they write, how they go on, and what they refuse."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import COMMON, build
from namm_ext import NAMM, remove, zoo
from namm_ext.evolution import (
    Evaluation,
    ImitateConfig,
    RecordProblem,
    evolve,
    run_folder,
    train,
)
from namm_ext.evolution.problem import Batch
from namm_ext.policy import Policy
from small_evolution import CONFIG, MEMORY, bank, make_problem, without_time

pytest.importorskip("cma")

SHORT = replace(CONFIG, generations=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))


@pytest.fixture(scope="module")
def problem(tokenizer: Any) -> RecordProblem:
    return make_problem(tokenizer)


@pytest.fixture
def finished(model: Any, problem: RecordProblem, tmp_path: Path) -> Path:
    evolve(model, problem, SHORT, tmp_path / "run")
    return tmp_path / "run"


def failure(*arguments: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as error:
        evolve(*arguments, **kwargs)
    return str(error.value)


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return without_time([json.loads(line) for line in lines])


def assert_same_run(one: Path, other: Path) -> None:
    states = [np.load(folder / "state.npz") for folder in (one, other)]
    for key in set(states[0].files) - {"log"}:
        assert np.array_equal(states[0][key], states[1][key]), key
    assert log_of(one) == log_of(other)
    policies = [NAMM.from_pretrained(folder / "policy") for folder in (one, other)]
    assert torch.equal(policies[0].params, policies[1].params)


def test_a_run_equals_itself_and_writes_what_it_found(
    model: Any, problem: RecordProblem, tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = []
    first = evolve(model, problem, CONFIG, tmp_path / "run", on_generation=records.append)
    second = evolve(model, problem, CONFIG)
    assert torch.equal(first.policy.params, second.policy.params)
    assert without_time(first.log) == without_time(second.log)
    assert records == first.log
    assert [r["length"] for r in records] == [96, 112, 96, 112]
    assert ["validation_fitness" in r for r in records] == [False, True, False, True]
    validated = {r["generation"]: r.get("validation_fitness", -np.inf) for r in records}
    assert first.generation == max(validated, key=lambda g: validated[g])

    assert log_of(tmp_path / "run") == without_time(first.log)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["popsize"] == 4
    assert stored["problem"]["lengths"] == [96, 112]
    saved = NAMM.from_pretrained(tmp_path / "run" / "policy")
    assert torch.equal(saved.params, first.policy.params)
    assert saved.config == MEMORY
    assert saved.budget == replace(CONFIG.budget, size=32)  # a quarter of the validation length
    (batch,) = problem.validation_batches()
    value = problem.fitness(model, saved, batch).fitness().item()
    assert value == pytest.approx(validated[first.generation], abs=1e-9)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "state.npz", "log.jsonl", "policy", ".lock"}


class Watched(RecordProblem):
    """Notes what a memory may keep of which contexts."""

    def fitness(self, model: Any, policy: Policy, batch: Batch, *arguments: Any) -> Evaluation:
        type(self).given.append((len(batch[0].input_ids), policy.budget.size))
        return super().fitness(model, policy, batch, *arguments)


def test_a_budget_is_a_share_of_each_length(
    model: Any, problem: RecordProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "given", [], raising=False)
    values = {name: getattr(problem, name) for name in problem.__dataclass_fields__ if name != "_"}
    evolve(model, Watched(**values), CONFIG)
    assert set(Watched.given) == {(96, 24), (112, 28), (128, 32)}


class Interrupted(RecordProblem):
    """Ctrl-C comes in one of the evaluations."""

    calls = -1

    def fitness(self, *arguments: Any) -> Evaluation:
        type(self).calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return super().fitness(*arguments)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "problem": "RecordProblem"}


@pytest.mark.parametrize("calls_before", [0, 2, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(
    model: Any,
    problem: RecordProblem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls_before: int,
) -> None:
    remove(model)
    unbroken = evolve(model, problem, CONFIG, tmp_path / "unbroken")
    values = {name: getattr(problem, name) for name in problem.__dataclass_fields__ if name != "_"}
    broken = Interrupted(**values)
    monkeypatch.setattr(Interrupted, "calls", calls_before + 1)
    with pytest.raises(KeyboardInterrupt):
        evolve(model, broken, CONFIG, tmp_path / "broken")
    assert model.config._attn_implementation != "namm"
    resumed = evolve(model, broken, CONFIG, tmp_path / "broken")
    assert torch.equal(resumed.policy.params, unbroken.policy.params)
    assert resumed.generation == unbroken.generation
    assert without_time(resumed.log) == without_time(unbroken.log)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_an_interrupted_fit_goes_on_in_it(
    model: Any, problem: RecordProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there before the fit, with all that was found; nothing is done twice."""
    imitation = ImitateConfig(rounds=2, steps=50, num_tokens=200, batch_size=2)
    config = replace(CONFIG, imitation=imitation)
    evolve(model, problem, config, tmp_path / "unbroken")

    def stop(record: dict[str, Any]) -> None:
        assert (tmp_path / "broken" / "config.json").exists()
        if (record["round"], record["step"]) == (2, 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(model, problem, config, tmp_path / "broken", on_imitation=stop)
    names = {path.name for path in (tmp_path / "broken").iterdir()}
    assert names == {"config.json", "fit.npz", ".lock"}
    monkeypatch.setattr(train, "calibrate_statistics", None)  # they are in the state
    steps: list[tuple[int, int]] = []
    evolve(
        *(model, problem, config, tmp_path / "broken"),
        on_imitation=lambda r: steps.append((r["round"], r["step"])),
    )
    assert steps == [(1, 0), (2, 0), (2, 50)]  # the first round is read again, not fitted
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_more_generations_continue_a_finished_run(
    model: Any, problem: RecordProblem, tmp_path: Path
) -> None:
    evolve(model, problem, replace(CONFIG, generations=2), tmp_path)
    longer = evolve(model, problem, CONFIG, tmp_path)
    assert without_time(longer.log) == without_time(evolve(model, problem, CONFIG).log)


def test_a_log_that_was_cut_off_is_whole_again(
    model: Any, problem: RecordProblem, finished: Path
) -> None:
    """A kill between state and log leaves half a line, or none."""
    before = log_of(finished)
    (finished / "log.jsonl").write_text('{"generation": 1, "len')
    evolve(model, problem, SHORT, finished)
    assert log_of(finished) == before


def test_a_state_is_written_whole_or_not_at_all(
    model: Any, problem: RecordProblem, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, move = os.fsync, os.replace

    def half(file: Any, **_: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left")

    def sync(fd: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(
        os, "replace", lambda *paths: (events.append(Path(paths[1]).name), move(*paths))
    )
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", half)
        with pytest.raises(OSError, match="no space left"):
            evolve(model, problem, CONFIG, finished)
    assert "state.npz" not in events
    events.clear()
    resumed = evolve(model, problem, CONFIG, finished)
    place = events.index("state.npz")
    assert events[place - 1 : place + 2] == ["file", "state.npz", "folder"]
    assert without_time(resumed.log) == without_time(evolve(model, problem, CONFIG).log)


def test_a_start_and_a_stop(model: Any, problem: RecordProblem) -> None:
    start = bank(1)[0]
    result = evolve(model, problem, CONFIG, x0=start, should_stop=lambda: True)
    assert torch.equal(result.policy.params, start)
    assert [record["generation"] for record in result.log] == [0]  # the start is validated
    assert failure(model, problem, CONFIG, x0=torch.zeros(3)) == (
        "evolve: x0 must be [4172] and finite, got [3]"
    )


def test_anything_that_makes_a_memory_can_be_evolved(
    model: Any, problem: RecordProblem, tmp_path: Path
) -> None:
    """Here two numbers: how two random scorers are mixed."""
    basis = bank(2)
    shapes = []

    def mixture(numbers: torch.Tensor) -> NAMM:
        shapes.append(tuple(numbers.shape))
        return NAMM(MEMORY, numbers @ basis)

    start = torch.tensor([1.0, 0.0])
    result = evolve(model, problem, CONFIG, tmp_path, x0=start, policy_of=mixture)
    assert set(shapes) == {(4, 2), (2,)}
    assert [record["generation"] for record in result.log] == [0, 1, 2, 3, 4]
    assert NAMM.from_pretrained(tmp_path / "policy").params.shape == (4172,)
    for wrong in ({"policy_of": mixture}, {"policy_of": mixture, "x0": torch.zeros(2, 2)}):
        assert "x0" in failure(model, problem, CONFIG, **wrong)


# What is refused ---------------------------------------------------------------------------------


def test_a_run_of_something_else_is_refused(
    model: Any, problem: RecordProblem, tokenizer: Any, finished: Path
) -> None:
    other_model = build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))
    with torch.no_grad():
        other_model.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-3
    other_tokenizer = zoo.load_tokenizer()
    other_tokenizer.add_tokens(["<a new one>"])
    texts = {"train": problem.train, "validation": problem.validation}
    settings = {"lengths": (96, 112), "num_examples": 2, "validation_lengths": (128,)}
    settings |= {"num_validation": 2, "mixes": problem.mixes}

    def records(own: Any = tokenizer, **changes: Any) -> RecordProblem:
        return RecordProblem(own, **{**texts, **settings, **changes})

    def refused(*differ: str) -> str:
        return (
            f"evolve: {finished} holds a run of something else; these differ: {', '.join(differ)}"
        )

    before = (finished / "state.npz").read_bytes()
    other = replace(CONFIG, sigma0=0.1, popsize=8)
    assert failure(model, problem, other, finished) == refused("popsize", "sigma0")
    found = failure(model, problem, CONFIG, finished, x0=bank(1)[0])
    assert found == refused("x0")
    assert failure(other_model, problem, CONFIG, finished) == refused("fingerprint.model")
    text = records(validation=(problem.validation[0] + "more",))
    assert failure(model, text, CONFIG, finished) == refused("fingerprint.data")
    cut = records(other_tokenizer)
    assert failure(model, cut, CONFIG, finished) == refused("fingerprint.tokenizer")
    task = records(families=("assign",))
    assert failure(model, task, CONFIG, finished) == refused(
        "problem.families", "fingerprint.problem"
    )
    assert (finished / "state.npz").read_bytes() == before
    evolve(model, records(), CONFIG, finished)  # made anew, and the same


def test_damaged_states_are_refused(model: Any, problem: RecordProblem, finished: Path) -> None:
    path = finished / "state.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        values = dict(file)

    damaged = f"evolve: {path} must be a state file, got a damaged one"
    path.write_bytes(whole[: len(whole) // 2])
    assert failure(model, problem, CONFIG, finished) == damaged
    path.write_bytes(b"\x80\x04not a zip")  # the first bytes of a pickle
    assert failure(model, problem, CONFIG, finished) == damaged
    np.savez(path, something=np.zeros(3))
    assert failure(model, problem, CONFIG, finished) == (
        f"evolve: {path} must be a state of this program, got one without 'x0'"
    )
    np.savez(path, **{**values, "search_mean": values["search_mean"] + 1})
    assert failure(model, problem, CONFIG, finished) == (
        f"evolve: {path} does not replay to the mean it holds; it was written with other "
        "versions of numpy or pycma: start a new run with its mean as x0"
    )
    path.write_bytes(whole)
    for text in ("{", "[]", '{"popsize": 4}'):
        (finished / "config.json").write_text(text)
        assert failure(model, problem, CONFIG, finished).startswith(
            f"evolve: {finished / 'config.json'} must be the description of a run of this version"
        )


LOCKING = """
import sys
from namm_ext.evolution.run_folder import RunFolder
with RunFolder.open(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_belongs_to_one_process(
    model: Any, problem: RecordProblem, finished: Path
) -> None:
    command = [sys.executable, "-c", LOCKING, str(finished)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            assert failure(model, problem, CONFIG, finished) == (
                f"another process works on the run in {finished}"
            )
        finally:
            other.kill()  # a lock does not outlive its process
    evolve(model, problem, SHORT, finished)


def test_a_folder_of_something_else_is_left_alone(
    model: Any, problem: RecordProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at before anything is computed."""
    monkeypatch.setattr(train, "calibrate_statistics", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert failure(model, problem, CONFIG, tmp_path / "model") == (
        f"evolve: output_dir must be empty or hold a run, got {tmp_path / 'model'} with config.json"
    )
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("")
    assert failure(model, problem, CONFIG, tmp_path / "file") == (
        f"evolve: output_dir must be a folder, got the file {tmp_path / 'file'}"
    )
    with pytest.raises(NotADirectoryError):
        evolve(model, problem, CONFIG, tmp_path / "file" / "run")


class NotANumber(RecordProblem):
    """One candidate's answers, or a validation, have no likelihood."""

    which = "answer_ll"

    def fitness(self, model: Any, policy: Any, batch: Any, num_candidates: int = 1) -> Evaluation:
        result = super().fitness(model, policy, batch, num_candidates)
        if self.which == "validation" and num_candidates == 1:
            result.metrics["text_ll"][0, 0] = float("nan")
        if self.which == "candidate" and num_candidates > 1:
            result.metrics["answer_ll"][2, 0] = float("nan")
        if self.which == "metric" and num_candidates == 1:
            result.metrics["exact_match"][0, 1] = float("inf")
        return result


@pytest.mark.parametrize(
    ("which", "message", "logged"),
    [
        ("candidate", "generation 1: fitness must be finite, got nan for candidate 2", 0),
        ("validation", "validation_fitness must be finite, got nan in generation 2", 1),
        ("metric", "validation_exact_match must be finite, got inf in generation 2", 1),
    ],
)
def test_what_is_not_a_number_is_reported_and_not_logged(
    model: Any,
    problem: RecordProblem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    message: str,
    logged: int,
) -> None:
    values = {name: getattr(problem, name) for name in problem.__dataclass_fields__ if name != "_"}
    monkeypatch.setattr(NotANumber, "which", which)
    assert failure(model, NotANumber(**values), CONFIG, tmp_path) == f"evolve: {message}"
    assert len(log_of(tmp_path)) == logged
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert not (tmp_path / "policy").exists()
    monkeypatch.setattr(NotANumber, "which", "nothing")
    resumed = evolve(model, NotANumber(**values), CONFIG, tmp_path)
    assert without_time(resumed.log) == without_time(evolve(model, problem, CONFIG).log)


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "calibrate_statistics", None)
    shares = replace(CONFIG, budget=replace(CONFIG.budget, layer_shares=(0.5, 1.0, 1.5)))
    assert failure(model, make_problem(tokenizer), shares, tmp_path) == (
        "evolve: layer_shares must have 2 entries, one per layer, got (0.5, 1.0, 1.5)"
    )
    short = make_problem(tokenizer, lengths=(96, 16))
    assert failure(model, short, CONFIG, tmp_path) == (
        "evolve: contexts must have at least 2 * n_up = 32 tokens, got 16"
    )
    assert list(tmp_path.iterdir()) == []


def test_locks_and_temporary_files_are_no_runs(tmp_path: Path) -> None:
    """A process that was killed while it looked at a folder leaves nothing in the way."""
    for name in (".lock", ".config.json.new"):
        (tmp_path / name).write_text("")
    with run_folder.RunFolder.open(tmp_path) as folder:
        folder.check({"popsize": 4})
    with run_folder.RunFolder.open(tmp_path) as folder:
        folder.check({"popsize": 8})  # nothing had been begun
    assert json.loads((tmp_path / "config.json").read_text())["popsize"] == 8
