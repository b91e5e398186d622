"""Examples are what they promise, and the metrics measure what they say."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from namm_ext import tasks, zoo
from namm_ext.corpus import load_documents

pytest.importorskip("transformers")

FAMILIES = tuple(tasks.FAMILIES)
TEST = load_documents("test")


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load_tokenizer()


def make(family, tokenizer, length=384, num_records=4, seed=tasks.TEST_SEED):
    return tasks.make_example(
        family, tokenizer, TEST, length=length, num_records=num_records, seed=seed
    )


def perfect_logits(examples, vocab_size):
    """Logits ``[B, length - 1, vocab_size]`` that are sure of every token."""
    targets = tasks.stack(examples)[:, 1:]
    return 30 * torch.nn.functional.one_hot(targets, vocab_size).float(), targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [160, 1000])
def test_example(family, length, tokenizer):
    example = make(family, tokenizer, length=length)
    ids = example.input_ids
    assert len(ids) == length
    assert len(example.answer_spans) == 4 // tasks.FAMILIES[family].writes
    assert len(example.value_spans) == 4
    queries = zip(
        example.answer_spans,
        example.record_spans,
        example.query_starts,
        example.distances,
        strict=True,
    )
    for (start, stop), (record_start, record_stop), query_start, distance in queries:
        assert ids[start - distance : stop - distance] == ids[start:stop]
        assert record_start < start - distance < stop - distance <= record_stop <= query_start
        before_record = tokenizer.decode(ids[:record_start])
        assert record_start == 1 or before_record.endswith("\n")
        assert tokenizer.decode(ids[record_start:record_stop]).endswith("\n")
        assert tokenizer.decode(ids[:query_start]).endswith("\n")


@pytest.mark.parametrize("family", ["assign", "prose", "mapping"])
def test_only_the_record_tells_the_answer(family, tokenizer):
    """The question repeats its record's line up to the value, and no other record's."""
    example = make(family, tokenizer)
    lines = [tokenizer.decode(example.input_ids[a:b]) for a, b in example.record_spans]
    for query, line in enumerate(lines):
        question = tasks.make_prompt(example, query).input_ids[example.query_starts[0] :]
        starts = [other.startswith(tokenizer.decode(question)) for other in lines]
        assert line == lines[starts.index(True)]
        assert starts.count(True) == 1


def test_latest_record_wins(tokenizer):
    example = make("latest", tokenizer, num_records=6)
    ids = example.input_ids
    first = [tokenizer.decode(ids[a:b]) for a, b in example.value_spans]
    for (start, stop), (record_start, record_stop) in zip(
        example.answer_spans, example.record_spans, strict=True
    ):
        question = tokenizer.decode(ids[record_start:record_stop]).split(":")[0] + ":"
        context = tokenizer.decode(ids[: example.query_starts[0]])
        assert context.count(question) == 2
        latest = context.rpartition(question)[2]
        assert latest.startswith(tokenizer.decode(ids[start:stop]))
    assert len(first) == 6


@pytest.mark.parametrize(("family", "names"), [("assign", 4), ("latest", 2)])
def test_records_in_use_among_idle_ones(family, names, tokenizer):
    """Lines in use come `mentions` times per write and are asked for; idle ones never again."""
    example = tasks.make_example(
        *(family, tokenizer, TEST), length=700, num_records=4, seed=1, mentions=3, num_idle=7
    )
    ids = example.input_ids
    assert len(example.answer_spans) == names
    values = [tokenizer.decode(ids[a:b]) for a, b in example.value_spans]
    assert len(values) == 4 * 3 + 7
    context = tokenizer.decode(ids[: example.query_starts[0]])
    for query, (start, stop) in enumerate(example.record_spans):
        line = tokenizer.decode(ids[start:stop])
        assert context.count(line) == 3
        question = tasks.make_prompt(example, query).input_ids[example.query_starts[0] :]
        assert line.startswith(tokenizer.decode(question))
    counts = sorted((values.count(v) for v in set(values)), reverse=True)
    assert counts[:4] == [3] * 4  # random values seldom agree; not with this seed
    assert counts[4:] == [1] * 7


def test_mixes_share_a_batch(tokenizer):
    mixes = (tasks.RecordMix(2), tasks.RecordMix(1, mentions=2, idle_per_1024=16))
    given = {"length": 256, "seed": 3}
    batch = tasks.make_mixed_batch(
        mixes, ("assign", "prose"), tokenizer, TEST, batch_size=5, **given
    )
    assert [len(e.value_spans) for e in batch] == [2, 2, 2 + 4, 2 + 4, 2 + 4]
    alone = tasks.make_batch(
        ("assign", "prose"), tokenizer, TEST, num_records=2, batch_size=2, **given
    )
    assert batch[:2] == alone
    assert len({e.input_ids for e in batch}) == 5


@pytest.mark.parametrize(
    "changed", [{"num_records": 0}, {"mentions": 0}, {"idle_per_1024": -1}], ids=str
)
def test_mix_errors_name_the_argument(changed):
    ((name, value),) = changed.items()
    least = 0 if name == "idle_per_1024" else 1
    message = f"RecordMix: {name} must be at least {least}, got {value}"
    with pytest.raises(ValueError, match=message):
        tasks.RecordMix(**changed)


def test_same_arguments_same_example(tokenizer):
    assert make("prose", tokenizer) == make("prose", zoo.load_tokenizer())
    assert make("prose", tokenizer) != make("prose", tokenizer, seed=tasks.TRAIN_SEED)
    few, many = (
        tasks.make_batch(
            FAMILIES, tokenizer, TEST, length=256, num_records=4, seed=7, batch_size=size
        )
        for size in (3, 9)
    )
    assert many[:3] == few
    assert [example.family for example in many] == [*FAMILIES, *FAMILIES[:2]]


def test_documents_may_be_any_texts(tokenizer):
    documents = ("alpha\nbeta\n" * 20, "gamma\n" * 30)
    example = tasks.make_example("assign", tokenizer, documents, length=512, num_records=2, seed=0)
    text = tokenizer.decode(example.input_ids[1 : example.query_starts[0]])
    lines = {line for line in text.splitlines()[1:] if " = " not in line}
    assert len(example.input_ids) == 512
    assert lines <= {"alpha", "beta", "gamma"}


def test_prompt_asks_without_answering(tokenizer):
    example = make("call", tokenizer)
    for query, (start, stop) in enumerate(example.answer_spans):
        prompt = tasks.make_prompt(example, query)
        asked = example.input_ids[example.query_starts[query] : start]
        context = example.input_ids[: example.query_starts[0]]
        assert prompt.input_ids == context + asked
        assert prompt.answer_ids == example.input_ids[start:stop]
    assert tasks.make_prompt(example) == tasks.make_prompt(example, 0)


def test_exact_match_needs_every_answer_token(tokenizer):
    examples = [make("signature", tokenizer), make("assign", tokenizer)]
    logits, targets = perfect_logits(examples, len(tokenizer))
    perfect = tasks.score_examples(tasks.score_tokens(logits, targets), examples)
    assert perfect.accuracy() == 1.0
    assert perfect.families == ("signature",) * 4 + ("assign",) * 4

    last_of_third = examples[0].answer_spans[2][1] - 1
    wrong = (targets[0, last_of_third - 1] + 1) % len(tokenizer)
    logits[0, last_of_third - 1, wrong] = 60.0
    scores = tasks.score_examples(tasks.score_tokens(logits, targets), examples)
    assert scores.exact_match.tolist() == [True, True, False, True] + [True] * 4
    assert scores.answer_logprob[2] < perfect.answer_logprob[2] - 1
    assert torch.equal(scores.text_logprob, perfect.text_logprob)


def test_log_likelihood_is_that_of_the_answers_tokens(tokenizer):
    example = make("assign", tokenizer, num_records=2)
    size = len(example.input_ids) - 1
    logprob = -torch.arange(size, dtype=torch.float64)[None]
    scores = tasks.TokenScores(logprob, torch.ones(1, size, dtype=torch.bool))
    found = tasks.score_examples(scores, [example])
    want = [-(start + stop - 3) / 2 for start, stop in example.answer_spans]
    assert found.answer_logprob.flatten().tolist() == want


def test_random_values_are_not_text(tokenizer):
    examples = [make("prose", tokenizer)]
    logits, targets = perfect_logits(examples, len(tokenizer))
    before = tasks.score_examples(tasks.score_tokens(logits, targets), examples)
    for start, stop in examples[0].value_spans:
        logits[0, start - 1 : stop - 1] = 0.0
    after = tasks.score_examples(tasks.score_tokens(logits, targets), examples)
    assert torch.equal(before.text_logprob, after.text_logprob)
    logits[0, examples[0].value_spans[0][0] - 3] = 0.0  # a token of the record's name or lead
    assert (
        tasks.score_examples(tasks.score_tokens(logits, targets), examples).text_logprob
        < before.text_logprob
    )


def test_scores_in_pieces_equal_the_whole(tokenizer):
    examples = [make("mapping", tokenizer)]
    targets = tasks.stack(examples)[:, 1:]
    logits = torch.randn(*targets.shape, len(tokenizer))
    whole = tasks.score_tokens(logits, targets)
    pieces = [
        tasks.score_tokens(logits[:, i : i + 100], targets[:, i : i + 100])
        for i in range(0, targets.shape[1], 100)
    ]
    assert torch.equal(whole.logprob, torch.cat([piece.logprob for piece in pieces], dim=1))
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(whole.logprob, expected)


def test_bits_per_byte_of_a_uniform_guess():
    assert tasks.bits_per_byte(10 * math.log(1 / 256), 10) == pytest.approx(8.0)


def test_family_sets_are_disjoint():
    evolution, held_out = set(tasks.EVOLUTION_FAMILIES), set(tasks.HELD_OUT_FAMILIES)
    unseen, varied = set(tasks.UNSEEN_FAMILIES), set(tasks.VARIED_FAMILIES)
    assert evolution | held_out | unseen == set(tasks.FAMILIES)
    sizes = [len(names) for names in (evolution, held_out, unseen, varied)]
    assert len(evolution | held_out | unseen | varied) == sum(sizes)
    surfaces = {family.record for family in tasks.VARIED_FAMILIES.values()}
    assert surfaces.isdisjoint(family.record for family in tasks.FAMILIES.values())
    assert len({tasks.TRAIN_SEED, tasks.VALIDATION_SEED, tasks.TEST_SEED}) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"family": "riddle"}, "family must be one of"),
        ({"length": 40}, "length must be at least"),
        ({"num_records": 1, "family": "latest"}, "num_records must be in"),
        ({"mentions": 0}, "mentions must be at least 1, got 0"),
        ({"num_idle": -1}, r"num_idle must be in \[0, \d+\] with 4 'assign' records, got -1"),
        ({"num_idle": 1000}, r"num_idle must be in"),
        ({"documents": "test"}, "documents must be a sequence of texts, got the text 'test'"),
        ({"documents": ()}, "documents must not be empty"),
    ],
    ids=[
        "family",
        "length",
        "num_records",
        "mentions",
        "idle",
        "many idle",
        "one text",
        "documents",
    ],
)
def test_errors_name_the_argument(changed, message, tokenizer):
    arguments = {
        "family": "assign",
        "documents": TEST,
        "length": 256,
        "num_records": 4,
        "seed": 0,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        tasks.make_example(tokenizer=tokenizer, **arguments)


def test_a_context_may_be_lines_alone(tokenizer):
    with pytest.raises(ValueError, match="length must be at least") as error:
        make("assign", tokenizer, length=40)
    needed = int(re.search(r"\d+", str(error.value))[0])
    assert len(make("assign", tokenizer, length=needed).input_ids) == needed


def test_misuse_of_the_metrics_is_an_error(tokenizer):
    example = make("assign", tokenizer)
    with pytest.raises(ValueError, match="query must be in"):
        tasks.make_prompt(example, 4)
    logits, targets = perfect_logits([example], len(tokenizer))
    tokens = tasks.score_tokens(logits[:, :-1], targets[:, :-1])
    with pytest.raises(ValueError, match="tokens must have shape"):
        tasks.score_examples(tokens, [example])


def test_example_cannot_be_changed(tokenizer):
    example = make("assign", tokenizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.family = "prose"
    assert np.isscalar(example.input_ids[0])


def test_import_leaves_transformers_alone():
    code = "import sys, namm_ext.tasks, namm_ext.zoo; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
