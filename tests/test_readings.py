"""Readings: exact length, the words of the chat template, nothing shared between splits."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import random

import numpy as np
import pytest
from namm_ext import zoo
from namm_ext.library import HELD_OUT_SOURCE, Library, load_library
from namm_ext.tasks import suite
from namm_ext.tasks.readings import Ask, Chat
from namm_ext.tasks.suite import filler, words

pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def chatty():
    tokenizer = zoo.load_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("task", suite.TASKS)
def test_contexts_are_exactly_as_long_as_asked(plain, chatty, task, length):
    for tokenizer, index in itertools.product((plain, chatty), range(4)):
        reading = suite.make_reading(task, tokenizer, split="test", length=length, index=index)
        assert len(reading.context_ids) == length
        assert len(reading.questions) == len(reading.spans)
        assert reading.task == task
        assert all(0 <= start < stop <= length for start, stop in reading.spans)


@pytest.mark.parametrize("task", suite.TASKS)
def test_the_answer_stands_where_the_span_says(chatty, task):
    for index in range(4):
        reading = suite.make_reading(task, chatty, split="test", length=1024, index=index)
        for question, (start, stop) in zip(reading.questions, reading.spans, strict=True):
            answer = chatty.decode(question.answer_ids).strip()
            assert answer
            assert answer in chatty.decode(reading.context_ids[start:stop])


def test_a_reading_is_one_message_of_the_user(chatty):
    for task in suite.TASKS:
        reading = suite.make_reading(task, chatty, split="test", length=1024, index=0)
        question = reading.questions[0]
        text = chatty.decode(reading.context_ids + question.ids)
        begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        assert text.startswith(begin)
        message = text[len(begin) : text.index(end)]
        prompt = chatty.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True
        ).input_ids
        prefix = chatty(text.split(end)[1], add_special_tokens=False).input_ids
        ours = list(reading.context_ids + question.ids)
        # The context is an extract: only the tokens at its cut beginning may differ.
        same = difflib.SequenceMatcher(None, ours, prompt + prefix, autojunk=False)
        assert sum(block.size for block in same.get_matching_blocks()) >= len(ours) - 3


def test_turns_follow_one_another(chatty):
    reading = suite.make_reading("multi_turn", chatty, split="test", length=1024, index=0)
    assert reading.turns
    ids = [i for q in reading.questions for i in q.ids + q.answer_ids]
    text = chatty.decode(ids)
    turn = ".<|im_end|>\n<|im_start|>user\n"
    assert text.count(turn) == len(reading.questions) - 1


def test_answers_of_a_tokenizer_that_joins_them_with_the_prefix(plain):
    chat = Chat(plain)
    ask = Ask("What?", "It is", "a number")
    question = chat.question(ask)
    joined = plain("\n\nQuestion: What?\nAnswer: It is a number", add_special_tokens=False)
    assert list(question.ids + question.answer_ids) == joined.input_ids


def test_a_reading_depends_on_its_index_alone(plain):
    arguments = dict(split="validation", length=1024)
    many = suite.make_readings("paraphrase", plain, 3, **arguments)
    assert suite.make_reading("paraphrase", plain, index=2, **arguments) == many[2]
    assert many[0] != many[1]
    other = suite.make_reading("paraphrase", plain, index=0, seed=1, **arguments)
    assert other.context_ids != many[0].context_ids


def test_splits_share_no_words():
    for name in words._LISTS:
        lists = [set(words.words(name, split)) for split in ("train", "validation", "test")]
        assert all(len(found) >= 3 for found in lists), name
        for a, b in itertools.combinations(lists, 2):
            assert a.isdisjoint(b), name


def test_the_library_is_divided_once():
    libraries = [load_library(split) for split in ("train", "validation", "test")]
    for a, b in itertools.combinations(libraries, 2):
        shared = sum(map(len, set(a.code) & set(b.code)))  # some modules exist twice
        assert shared < 0.02 * min(sum(map(len, a.code)), sum(map(len, b.code)))
    sources = [[source for source, _ in library.prose] for library in libraries]
    assert [HELD_OUT_SOURCE in names for names in sources] == [False, False, True]
    with pytest.raises(ValueError, match="split must be one of"):
        load_library("dev")


def test_what_is_held_out_is_never_trained_on(plain):
    for task in suite.HELD_OUT_TASKS:
        with pytest.raises(ValueError, match="never trained on"):
            suite.make_reading(task, plain, split="train", length=1024, index=0)
    texts = suite.fit_texts(plain, length=1024, count=80)
    assert {len(ids) for ids in texts} == {1024}
    text = "\n".join(plain.decode(ids) for ids in texts)
    assert "magic numbers" in text
    assert "VAR " not in text
    family = next(f for f in suite.FACT_FAMILIES if f.name == suite.HELD_OUT_FAMILY)
    for statement in family.statements:
        literal = max(statement.format(who="@", what="@").split("@"), key=len)
        assert literal not in text


def test_fit_texts_depend_on_the_seed_alone(plain):
    texts = suite.fit_texts(plain, length=1024, count=6)
    assert suite.fit_texts(plain, length=1024, count=4) == texts[:4]
    assert suite.fit_texts(plain, length=1024, count=1, seed=1)[0] != texts[0]


def _sentences(number, count):
    """English enough to be filler."""
    draw = random.Random(number)
    nouns = ("river", "window", "garden", "engine", "letter", "mountain", "paper", "winter")
    return " ".join(
        f"The {draw.choice(nouns)} of the {draw.choice(nouns)} is here." for _ in range(count)
    )


def _library(split):
    """Texts that are the same on every machine, with some that are no filler among them."""
    prose, code = [], []
    for i in range(40):
        text = _sentences(i, 3)
        no_filler = (text.lower(), text[:-1], ">>> " + text, text[:40] + ".", "+/- " * 20 + text)
        prose.append("\n\n".join([text, _sentences(i, 40), no_filler[i % 5], text.upper()]))
        code.append(
            f"import module_{i}\n\n\ndef function_{i}(value):\n    other = value + {i}\n"
            f"    return other * {i}\n\n\nNAMES_{i} = {[f'name_{j}' for j in range(i % 9)]}\n"
            f"\n\nclass Ä{i}:\n    text = {_sentences(i, 2)!r}\n"
        )
    return Library(split, (("a", tuple(prose[::2])), ("b", tuple(prose[1::2]))), tuple(code))


DIGESTS = {
    "single": "5136eaa4caa9",
    "multi_key": "5c16151f816f",
    "multi_value": "6eb671d6bda8",
    "multi_query": "1a16abd444da",
    "paraphrase": "bb83d0108cb6",
    "overwritten": "02701f25e72b",
    "multi_turn": "5f48c07fb4a5",
    "many_shot": "fd2f88f955ac",
    "table": "d345b45ab4a2",
    "code": "176a34f0b7cc",
    "variable_tracking": "19b235e6ac56",
    "unseen_family": "a32f2e2b1bd8",
    "fit": "e8b0da750f94",
    "visible": "4185b753e177",
}


@pytest.mark.parametrize("task", [*suite.TASKS, "fit", "visible"])
def test_the_same_readings_on_every_machine(chatty, task):
    """Figures of memories are of these readings: another one is another benchmark."""
    given = {"length": 700, "library": _library("test"), "split": "test"}
    if task == "fit":
        made = suite.fit_texts(chatty, count=8, **{**given, "split": "train"})
    else:
        make = suite.make_visible_reading if task == "visible" else suite.make_reading
        name = "multi_key" if task == "visible" else task
        readings = [make(name, chatty, index=i, **given) for i in range(3)]
        made = [
            (r.context_ids, [(q.ids, q.answer_ids) for q in r.questions], r.spans) for r in readings
        ]
    assert hashlib.sha256(repr(made).encode()).hexdigest()[:12] == DIGESTS[task]


@pytest.mark.parametrize(("signs", "running"), [(13, True), (14, False), (15, False)])
def test_running_text_is_mostly_letters(signs, running):
    text = "A" + "(" * signs + "b" * (198 - signs) + "."
    assert len(text) == 200
    assert filler._is_running_text(text) == running


def test_too_short_a_context_is_an_error(plain):
    with pytest.raises(ValueError, match="table does not fit into 128 tokens"):
        suite.make_reading("table", plain, split="test", length=128, index=0)
    with pytest.raises(ValueError, match="task must be one of"):
        suite.make_reading("tables", plain, split="test", length=1024, index=0)


def test_windows_know_their_bytes(plain):
    texts = ["Ein Bär läuft. " * 40, "Two words. " * 60]
    windows = suite.text_windows(plain, texts, 64, 3)
    assert len({window.ids for window in windows}) == 3
    for window in windows:
        assert len(window.ids) == 64
        assert window.start == 32
        scored = plain.decode(window.ids[window.start :])
        assert abs(len(scored.encode()) - window.num_bytes) <= 3
    with pytest.raises(ValueError, match="need 64000"):
        suite.text_windows(plain, texts, 64, 1000)
    assert np.mean([w.num_bytes for w in windows]) > 32
