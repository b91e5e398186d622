"""ask: one reading, many questions, each as if it were the only one."""

from __future__ import annotations

import doctest

import pytest
import torch

pytest.importorskip("transformers")

from namm_ext import NAMMCache, ask, asking, baselines, zoo
from namm_ext.baselines import NeverEvict, StreamingLLM

TEXT = "import os\n" + "".join(f"value_{i} = {i * 7}\n" for i in range(60))
QUESTIONS = ["value_3?", "def f(x):\n    return value_5", "What is imported?"]


@pytest.fixture(scope="module")
def loaded():
    return zoo.load_model(), zoo.load_tokenizer()


def test_docstring_example():
    result = doctest.testmod(asking)
    assert result.attempted > 3
    assert result.failed == 0


@pytest.mark.parametrize("visible", [False, True])
def test_answers_are_those_of_stock_if_nothing_is_forgotten(loaded, visible):
    model, tokenizer = loaded
    found = ask(
        model, tokenizer, TEXT, QUESTIONS, NeverEvict(n_up=64), question_visible=visible,
        max_new_tokens=8,
    )  # fmt: skip
    for question, answer in zip(QUESTIONS, found.answers, strict=True):
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        ids += tokenizer.encode(f"\n\nQuestion: {question}\nAnswer: ", add_special_tokens=False)
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        assert answer == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    assert found.report.live_fraction == 1


def test_questions_do_not_see_each_other(loaded, monkeypatch):
    model, tokenizer = loaded
    policy = StreamingLLM(64, n_up=16)
    many = ask(model, tokenizer, TEXT, QUESTIONS, policy, max_new_tokens=8)
    alone = [ask(model, tokenizer, TEXT, q, policy, max_new_tokens=8) for q in QUESTIONS]
    assert many.answers == [one.answers[0] for one in alone]
    assert many.report.kept_fraction < 0.5
    made = []
    original = NAMMCache.__init__
    monkeypatch.setattr(NAMMCache, "__init__", lambda *a, **k: made.append(1) or original(*a, **k))
    ask(model, tokenizer, TEXT, QUESTIONS, policy, max_new_tokens=1)
    assert len(made) == 1
    ask(model, tokenizer, TEXT, QUESTIONS, policy, max_new_tokens=1, question_visible=True)
    assert len(made) == 4


def test_rules_of_two_passes_read_the_context_first(loaded):
    policy = baselines.KVzip(0.25, n_up=64)
    found = ask(*loaded, TEXT, QUESTIONS[0], policy, max_new_tokens=4)
    assert found.report.kept_fraction == pytest.approx(0.25, abs=0.02)
    assert loaded[0].config._attn_implementation == "sdpa"


def test_what_is_refused(loaded):
    with pytest.raises(ValueError, match="ask: questions must be one or more texts, got"):
        ask(*loaded, TEXT, [], NeverEvict())
    with pytest.raises(ValueError, match="ask: context must not be empty"):
        ask(*loaded, "", "What?", NeverEvict())
