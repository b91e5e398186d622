"""Answers are what a plain pass over context, question and answer gives, whatever the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from namm_ext import zoo
from namm_ext.corpus import load_documents
from namm_ext.tasks import suite

pytest.importorskip("transformers")

from namm_ext import baselines
from namm_ext.answers import answer_readings, interval, text_bits

LENGTH = 512


@pytest.fixture(scope="module")
def model():
    return zoo.load_model()


@pytest.fixture(scope="module")
def readings():
    tokenizer = zoo.load_tokenizer()
    tasks = ("paraphrase", "multi_turn", "table")
    return [
        suite.make_reading(task, tokenizer, split="validation", length=LENGTH, index=i)
        for task in tasks
        for i in range(2)
    ]


@pytest.fixture(scope="module")
@torch.inference_mode()
def expected(model, readings):
    """One plain pass per question."""
    rows = []
    for reading in readings:
        before = list(reading.context_ids)
        for question in reading.questions:
            ids = before + list(question.ids)
            logits = model(torch.tensor([ids + list(question.answer_ids)])).logits
            logits = logits[0, len(ids) - 1 : -1]
            targets = torch.tensor(question.answer_ids)
            logprob = logits.double().log_softmax(-1).gather(1, targets[:, None])
            rows.append((bool((logits.argmax(-1) == targets).all()), logprob.sum().item()))
            if reading.turns:
                before = ids + list(question.answer_ids)
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("policy", [None, baselines.StreamingLLM(2048)])
def test_answers_of_everything_kept(model, readings, expected, policy, batch_size):
    correct, loglik = expected
    answers = answer_readings(model, policy, readings, batch_size=batch_size)
    assert np.array_equal(answers.correct, correct)
    np.testing.assert_allclose(answers.loglik, loglik, rtol=1e-3, atol=1e-3)
    counts = [len(reading.questions) for reading in readings]
    assert np.array_equal(answers.reading, np.repeat(np.arange(len(readings)), counts))
    assert np.array_equal(answers.kept, np.ones(len(readings)))
    assert answers.kv_bytes == answers.full_bytes


def test_a_memory_forgets(model, readings):
    policy = baselines.StreamingLLM(128, n_up=64)
    answers = answer_readings(model, policy, readings, batch_size=2)
    alone = answer_readings(model, policy, readings)
    np.testing.assert_allclose(answers.loglik, alone.loglik, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(answers.kept, 128 / LENGTH)
    assert answers.kv_bytes / answers.full_bytes == pytest.approx(128 / LENGTH)
    assert answers.memory_bytes > 0
    full = answer_readings(model, None, readings)
    assert full.loglik.mean() > answers.loglik.mean()
    assert full.memory_bytes == 0


def test_questions_do_not_see_one_another(model, readings):
    reading = readings[0]
    together = answer_readings(model, None, [reading])
    for i, question in enumerate(reading.questions):
        alone = dataclasses.replace(reading, questions=(question,))
        found = answer_readings(model, None, [alone]).loglik
        np.testing.assert_allclose(found, together.loglik[i : i + 1], rtol=1e-3, atol=1e-3)


def test_lengths_must_agree(model, readings):
    short = dataclasses.replace(readings[0], context_ids=readings[0].context_ids[:64])
    with pytest.raises(ValueError, match="of one length"):
        answer_readings(model, None, [readings[0], short])
    with pytest.raises(ValueError, match="non-empty"):
        answer_readings(model, None, [])


@torch.inference_mode()
def test_bits_per_byte(model):
    windows = suite.text_windows(zoo.load_tokenizer(), load_documents("validation"), 256, 3)
    found = text_bits(model, None, windows, batch_size=2)
    for bits, window in zip(found, windows, strict=True):
        logits = model(torch.tensor([window.ids])).logits[0, window.start - 1 : -1].double()
        targets = torch.tensor(window.ids[window.start :])
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        assert bits == pytest.approx(nats / np.log(2) / window.num_bytes, rel=1e-4)
    forgetful = text_bits(model, baselines.StreamingLLM(32, n_up=32), windows)
    assert forgetful.mean() > found.mean()


def test_intervals_resample_contexts_not_questions():
    contexts = np.repeat(np.arange(40), 8)
    scores = np.repeat(np.random.default_rng(0).random(40) < 0.5, 8)
    mean, low, high = interval([scores], contexts)
    assert mean == scores.mean()
    expected = 1.96 * 0.5 / 40**0.5
    assert high - low == pytest.approx(2 * expected, rel=0.1)
    independent = interval([scores], np.arange(320))
    assert independent[2] - independent[1] < 0.5 * (high - low)


def test_intervals_are_paired_and_weigh_tasks_equally():
    contexts = np.arange(60)
    tasks = np.array(["a"] * 50 + ["b"] * 10)
    a = np.where(tasks == "a", 1.0, 0.0)
    assert interval([a], contexts, tasks=tasks)[0] == 0.5
    noise = np.random.default_rng(1).random(60)
    difference = interval([noise + 0.25, noise], contexts, statistic=lambda x, y: x - y)
    np.testing.assert_allclose(difference, 0.25)
    ratio = interval([noise / 2, noise], contexts, statistic=lambda x, y: x / y)
    np.testing.assert_allclose(ratio, 0.5)
