"""Measuring: fixed inputs, rows that can be resumed, intervals, tuning, tables."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from namm_ext import NAMM, Budget, NAMMConfig, corpus, measure, tasks, zoo
from namm_ext.baselines import Full, StreamingLLM
from namm_ext.baselines.grid import GRID
from namm_ext.measure import tables
from namm_ext.measure.methods import beside, rule_from_dict
from namm_ext.policy import Policy
from namm_ext.tasks import suite
from rich.console import Console

MIX = tasks.RecordMix(2, mentions=2, idle_per_1024=4)


@pytest.fixture(scope="module")
def model():
    return zoo.load_model()


@pytest.fixture(scope="module")
def records() -> measure.RecordWorkload:
    return measure.RecordWorkload.make(
        zoo.load_tokenizer(),
        "test",
        length=256,
        names=("assign", "prose"),
        examples_per_task=2,
        mix=MIX,
        num_windows=2,
    )


# What is read --------------------------------------------------------------------------------


def test_records_are_fixed_and_held_out(records: measure.RecordWorkload) -> None:
    tokenizer = zoo.load_tokenizer()
    sizes = {"length": 256, "names": ("assign", "prose"), "examples_per_task": 2, "mix": MIX}
    again = measure.RecordWorkload.make(tokenizer, "test", num_windows=2, **sizes)
    validation = measure.RecordWorkload.make(tokenizer, "validation", num_windows=2, **sizes)
    assert records == again
    assert records.tasks == ("assign", "prose")
    for name in records.tasks:
        drawn = {example.input_ids for example in records.examples[name]}
        assert len(drawn) == 2
        assert not drawn & {example.input_ids for example in validation.examples[name]}
    window = records.windows["code"][0]
    assert (len(window.ids), window.start) == (256, 1)
    source = tokenizer.decode(window.ids[1:])
    assert source[200:300] in "\n\n".join(corpus.load_documents("test"))
    assert window.num_bytes == len(source.encode())


@pytest.mark.parametrize(("length", "num_records"), [(256, 2), (512, 6), (1024, 8)])
def test_short_contexts_have_fewer_records(length: int, num_records: int) -> None:
    made = measure.RecordWorkload.make(
        zoo.load_tokenizer(), "test", length=length, examples_per_task=1, num_windows=0
    )
    counts = {len(e.answer_spans) for examples in made.examples.values() for e in examples}
    assert max(counts) == num_records


def test_no_record_fits() -> None:
    with pytest.raises(tasks.TooShort, match="length must be at least"):
        measure.RecordWorkload.make(zoo.load_tokenizer(), "test", length=32, num_windows=0)


def test_readings_have_the_questions_that_were_asked_for() -> None:
    make = measure.ReadingWorkload.make
    sizes = {"length": 512, "names": ("paraphrase", "single"), "questions": 7, "num_windows": 1}
    workload = make(zoo.load_tokenizer(), "test", **sizes)
    assert workload == make(zoo.load_tokenizer(), "test", **sizes)
    asked = {name: len(workload.readings[name][0].questions) for name in workload.tasks}
    for name, drawn in workload.readings.items():
        assert len(drawn) == -(-7 // asked[name])
        assert {len(reading.context_ids) for reading in drawn} == {512}
    assert workload.windows.keys() == {"prose", "code"}
    assert {windows[0].start for windows in workload.windows.values()} == {256}


@pytest.mark.parametrize("task", ["multi_turn", "paraphrase"])
def test_a_visible_question_ends_the_context(task: str) -> None:
    tokenizer = zoo.load_tokenizer()
    of = {"split": "test", "length": 512, "index": 1}
    hidden = suite.make_reading(task, tokenizer, **of)
    visible = suite.make_visible_reading(task, tokenizer, **of)
    (question,) = visible.questions
    asked = hidden.questions[0 if hidden.turns else 1]
    assert len(visible.context_ids) == 512
    assert (*visible.context_ids, *question.ids)[-len(asked.ids) :] == asked.ids
    assert question.answer_ids == asked.answer_ids
    ((start, stop),) = visible.spans
    stated = tokenizer.decode(visible.context_ids[start:stop])
    assert tokenizer.decode(question.answer_ids).strip() in stated
    assert not visible.turns


def test_bits_per_byte_is_that_of_all_text_together(model, records) -> None:
    from namm_ext.answers import text_bits

    windows = records.windows["code"]
    bits = text_bits(model, None, windows)
    sizes = [window.num_bytes for window in windows]
    expected = np.dot(bits, sizes) / sum(sizes)
    assert measure.bits_per_byte(model, None, windows) == pytest.approx(expected)
    assert len(set(sizes)) == 2


# Comparing -----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_interrupted_comparison_goes_on(model, records, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    methods = [
        measure.full_method(),
        measure.Method("NAMM", NAMM(NAMMConfig(n_up=16), budget=Budget(9))),
    ]
    settings = {"tasks": ("assign", "prose")}
    timing = measure.Timing(new_tokens=2, repeats=2)

    def plan(results: measure.Results) -> list[measure.Step]:
        return measure.plan(model, None, methods, [records], [0.5, 0.25], results, timing)

    def stop(i: int, name: str) -> None:
        if i == 5:
            raise Interrupted

    results = measure.Results(settings, path)
    steps = plan(results)
    with pytest.raises(Interrupted):
        measure.compare(steps, results, stop)
    again = measure.Results(settings, path)
    rest = plan(again)
    assert [step.name for step in rest] == [step.name for step in steps[5:]]
    measure.compare(rest, again, lambda *_: None)
    assert plan(measure.Results(settings, path)) == []

    content = json.loads(path.read_text())
    assert [(row["method"], row["keep"]) for row in content["rows"]] == [
        (measure.FULL, 1.0), ("NAMM", 0.5), ("NAMM", 0.25),
    ]  # fmt: skip
    assert [row["kept"] for row in content["rows"]] == [1, 0.5, 0.25]
    # A quarter or a half, and room for the n_up = 16 tokens until the next update.
    assert [row["cost"]["kv_bytes"] / row["cost"]["full_bytes"] for row in content["rows"]] == [
        1, (128 + 16) / 256, (64 + 16) / 256,
    ]  # fmt: skip
    for row in content["rows"]:
        low, high = row["interval"][1:]
        assert low <= row["accuracy"] <= high
        assert row["share_of_full"][0] == pytest.approx(
            row["accuracy"] / content["rows"][0]["accuracy"]
        )

    other = [methods[0], measure.Method("NAMM", methods[1].policy.with_budget(sink_tokens=1))]
    changed = measure.plan(
        model, None, other, [records], [0.25], measure.Results(settings, path), timing
    )
    assert {step.name.split(",")[0] for step in changed} == {"NAMM", "time and bytes at 256 tokens"}


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    measure.Results({"questions": 8}, path).save()
    with pytest.raises(ValueError, match=r"of other settings .questions 8, now 24.; name another"):
        measure.Results({"questions": 24}, path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is not a file of results"):
        measure.Results({}, path)


def test_the_stock_cache_and_a_store_that_keeps_all_are_alike(model, records) -> None:
    for task in records.tasks:
        assert records.ask(model, None, task) == records.ask(model, Full(), task)


def row(method: str, *shares: list[float], keep: float = 0.25) -> measure.Row:
    results = [measure.TaskResult(8, s, [keep] * len(s)) for s in shares]
    cost = measure.Cost(1024, keep, 31, 17, 90, 100, 0.012, 0.0015, 64)
    named = dict(zip(measure.FAMILIES, results, strict=False))
    return measure.Row(method, {}, 1024, keep, named, {"code": 1.0}, cost)


def test_intervals_are_paired() -> None:
    full = row(measure.FULL, [1.0, 0.5, 0.0, 1.0], [0.5, 1.0], keep=1.0)
    half = row("NAMM", [0.5, 0.25, 0.0, 0.5], [0.25, 0.5])
    # On every context half of what the full cache answers: there is nothing unsure about it.
    assert half.share_of(full) == pytest.approx((0.5, 0.5, 0.5))
    value, low, high = half.accuracy_interval()
    assert value == half.accuracy == pytest.approx((0.3125 + 0.375) / 2)
    assert low < value < high
    # One context per task: tasks are drawn.
    few = row("NAMM", [0.5], [1.0])
    assert few.accuracy_interval()[1:] == (0.5, 1.0)
    assert row("NAMM", [0.5]).accuracy_interval() is None
    assert few.share_of(row(measure.FULL, [1.0])) is None


# The baselines' settings -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stdlib-1m", "smollm2-135m"])
def test_tuned_rules_are_what_their_file_says(name: str) -> None:
    rules = measure.tuned_rules(name)
    assert rules.keys() == measure.RULES.keys()
    for rule_name, rule in rules.items():
        assert type(rule) is measure.RULES[rule_name]
        settings = measure.rule_to_dict(rule)
        assert repr(rule_from_dict(rule_name, settings)) == repr(rule)
        if name == "smollm2-135m":
            tried = [measure.rule_to_dict(rule) for rule in GRID[rule_name]]
            assert settings in tried, rule_name


def test_rules_follow_the_memory() -> None:
    memory = NAMM(NAMMConfig(n_up=16), budget=Budget(9, layer_shares=(0.5, 1.5)))
    rule = beside(measure.tuned_rules("stdlib-1m")["SnapKV"], memory)
    assert (rule.n_up, rule.window, rule.budget.layer_shares) == (16, 16, (0.5, 1.5))
    assert measure.fixed_budget(rule, 0.25, 1023).budget.size == 255
    assert measure.fixed_budget(rule, 1, 1023).budget.size == 1023


def test_tuning_takes_the_best(
    monkeypatch: pytest.MonkeyPatch, records: measure.RecordWorkload
) -> None:
    tried = tuple(StreamingLLM(Budget(0.25, sink_tokens=n)) for n in (4, 16, 1))
    monkeypatch.setitem(GRID, "StreamingLLM", tried)
    values = {4: 0.4, 16: 0.6, 1: 0.6}

    def ask(self: object, model: object, policy: Policy, task: str) -> measure.TaskResult:
        assert (policy.budget.size, policy.n_up) == (32, 16)
        return measure.TaskResult(1, [values[policy.budget.sink_tokens]], [0.125])

    monkeypatch.setattr(measure.RecordWorkload, "ask", ask)
    seen: list[float] = []
    found = measure.tune(
        None, None, records, rules=("StreamingLLM",), n_up=16, keep=0.125,
        on_trial=lambda _, score: seen.append(score),
    )  # fmt: skip
    assert seen == [0.4, 0.6, 0.6]
    assert found == {"StreamingLLM": tried[1]}


# Tables ----------------------------------------------------------------------------------------


def results() -> measure.Results:
    made = measure.Results({})
    for name, share, bits in ((measure.FULL, 1.0, 1.0), ("NAMM", 0.75, 1.2), ("TOVA", 0.5, 1.1)):
        keep = 1.0 if name == measure.FULL else 0.25
        made.rows.append(row(name, *[[share, share]] * len(measure.FAMILIES), keep=keep))
        made.rows[-1].bits_per_byte = {"code": bits}
    return made


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_and_mark_the_best(width: int) -> None:
    console = Console(
        width=width, record=True, force_terminal=True, color_system="standard", file=StringIO()
    )
    console.print(tables.answers_table(results()))
    console.print(tables.costs_table(results()))
    plain = console.export_text(clear=False)
    assert "…" not in plain
    assert "1,024 tokens, 25 % kept, 56 questions" in plain
    assert "75.0 ± 0.0 75 (75-75)" in plain
    assert re.search(r"1\.200 +\+20\.0 +25\.0 +31 +17 +48 +12 +1\.5", plain)
    styled = re.sub("m +", "m", console.export_text(styles=True))
    marked = [line for line in styled.splitlines() if "1;32m" in line]
    assert len(marked) == 2
    assert "1;32m75.0" in marked[0]
    assert "1;32m1.100" in marked[1]
    assert "1;32m1.200" not in marked[1]


def test_verdict() -> None:
    assert tables.verdict(results()).plain == (
        "1,024 tokens, 25 % kept, 56 questions: NAMM answers 75% (75% to 75%) of what the full "
        "cache answers, the best baseline (TOVA) 50%; its keys and values take 31% of the bytes."
    )


def test_the_legend_says_what_was_asked_and_what_columns_mean() -> None:
    readings, asked = tables.legend(64, None).plain, tables.legend(64, None, True).plain
    mix = tables.legend(64, tasks.RecordMix(8, mentions=2, idle_per_1024=16)).plain
    assert "The question comes when" in readings
    assert "has read the question" in asked
    assert "8 records per context where they fit, each stated 2 times, among 16 per 1,024" in mix
    for text in (readings, asked, mix):
        assert "±: half of a 95 % bootstrap interval" in text
        assert "one update every 64 tokens" in text


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    from namm_ext.measure.progress import progress

    said = StringIO()
    with progress(Console(file=said, width=100), 3) as show:
        for i in range(3):
            show(i, f"step {i}")
    assert said.getvalue() == "    0 s  0/3  step 0\n"
